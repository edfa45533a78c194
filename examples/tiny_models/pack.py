"""Write a trained tiny model into the application as JSON text.

python examples/tiny_models/pack.py build/tiny-diffusion/pipeline fgl_app/tiny/diffusion.json
python examples/tiny_models/pack.py build/tiny-captioner/model fgl_app/tiny/captioner.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from fgl_app import tiny

tiny.pack(Path(sys.argv[1]), Path(sys.argv[2]))
print(sys.argv[2], Path(sys.argv[2]).stat().st_size, "bytes")
