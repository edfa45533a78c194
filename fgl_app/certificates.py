"""A development certificate authority, the SuperLink's certificate, and a key pair per SuperNode.

One folder per machine, so that each is handed what it needs and nothing else::

    DIR/ca/      ca.key  ca.crt                     stays where it was made, offline
    DIR/server/  ca.crt  server.pem  server.key     the SuperLink's
    DIR/SITE/    ca.crt  supernode.key  supernode.pub
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fgl_app.errors import FGLError
from fgl_app.files import set_mode, write_atomically

_ALWAYS = ("localhost", "127.0.0.1")
"""The server's own names: Flower's commands on the server itself use them."""
_CLOCK_SKEW = timedelta(hours=1)
_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")
_SITE = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_TAKEN = ("ca", "server")


class CertificateError(FGLError):
    """Certificates cannot be made as asked; nothing was written."""


def make_certificates(folder: Path, hosts: Sequence[str], sites: Sequence[str], days: int) -> None:
    """Make a development CA, a server certificate, and one ECDSA key pair per SuperNode.

    Args:
        folder: Absent or empty; afterwards only its owner can enter it.
        hosts: Names and IP addresses under which the SuperNodes reach the server; ``localhost`` and ``127.0.0.1``
            are added.
        sites: Names of the SuperNodes, which are those of their folders.
        days: Validity of both certificates.

    Raises:
        CertificateError: If a host or site has no valid name, or the folder holds something.
    """
    names = [_general_name(host) for host in dict.fromkeys((*hosts, *_ALWAYS))]
    _check_sites(sites)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CertificateError(
            f"The folder for certificates must be absent or empty, but {str(folder)!r} is not. Nothing was written; "
            "use another folder, or move that one away."
        )
    authority_key, authority = _authority(days)
    server_key, server = _server_certificate(names, authority_key, authority, days)
    authority_pem = authority.public_bytes(Encoding.PEM)

    for part in (folder, folder / "ca", folder / "server", *(folder / site for site in sites)):
        part.mkdir(parents=True, exist_ok=True)
        set_mode(part, 0o700)
        if part != folder:
            write_atomically(part / "ca.crt", authority_pem)
    write_atomically(folder / "ca" / "ca.key", _private_bytes(authority_key, PrivateFormat.PKCS8), 0o600)
    write_atomically(folder / "server" / "server.pem", server.public_bytes(Encoding.PEM))
    write_atomically(folder / "server" / "server.key", _private_bytes(server_key, PrivateFormat.PKCS8), 0o600)
    for site in sites:
        key = ec.generate_private_key(ec.SECP384R1())  # Flower asks for a NIST curve, in OpenSSH's format
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        write_atomically(folder / site / "supernode.key", _private_bytes(key, PrivateFormat.OpenSSH), 0o600)
        write_atomically(folder / site / "supernode.pub", public + f" {site}\n".encode())


def _authority(days: int) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("FGL development CA")
    certificate = (
        _builder(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    return key, certificate


def _server_certificate(
    names: Sequence[x509.GeneralName],
    authority_key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    days: int,
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(_name("FGL SuperLink"), authority.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    return key, certificate


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, certificates: bool) -> x509.KeyUsage:
    """Return the usage of a CA's key, which signs certificates, or of a server's, which signs handshakes."""
    return x509.KeyUsage(
        digital_signature=not certificates,
        key_cert_sign=certificates,
        crl_sign=certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _private_bytes(key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> bytes:
    # Services start unattended, and Flower reads no encrypted keys: the file's mode protects it.
    return key.private_bytes(Encoding.PEM, form, NoEncryption())


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _HOST.fullmatch(host):
        raise CertificateError(
            f"--host must be a host name or an IP address, without scheme and port, but is {host!r}. Use for example "
            "--host fgl.example.org --host 192.0.2.7."
        )
    return x509.DNSName(host)


def _check_sites(sites: Sequence[str]) -> None:
    for site in sites:
        if not _SITE.fullmatch(site) or site in _TAKEN or sites.count(site) > 1:
            raise CertificateError(
                "--site must be lower-case letters, digits and hyphens, neither ca nor server, each name once, but is "
                f"{site!r}. Use for example --site site0 --site site1."
            )
