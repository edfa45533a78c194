"""Succeed if one of the addresses given answers with 200; of the process in this container, so unverified."""

import ssl
import sys
import urllib.request

for address in sys.argv[1:]:
    try:
        context = ssl._create_unverified_context() if address.startswith("https:") else None
        urllib.request.urlopen(address, timeout=8, context=context).close()
        sys.exit(0)
    except OSError:  # urllib's errors are OSErrors
        pass
sys.exit(1)
