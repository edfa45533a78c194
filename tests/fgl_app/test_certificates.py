"""`fgl certificates`: a chain that TLS accepts, keys that Flower reads, modes, and refusals that write nothing."""

import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve
from typer.testing import CliRunner

from fgl_app.certificates import CertificateError, make_certificates
from fgl_app.cli import cli


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "certificates"
    make_certificates(folder, ["fgl.example.org", "192.0.2.7", "::1"], ["site0", "site1"], days=30)
    return folder


def handshake(folder, name: str) -> str | None:
    """Connect by TLS, as a SuperNode with the made `ca.crt` does; return the protocol's version."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server" / "server.pem", folder / "server" / "server.key")
    client = ssl.create_default_context(cafile=folder / "site0" / "ca.crt")
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    here, there = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(there, server_side=True).close()
        except OSError:
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(here, server_hostname=name) as connection:
            return connection.version()
    finally:
        here.close()
        thread.join()


@pytest.mark.parametrize("name", ["fgl.example.org", "192.0.2.7", "::1", "localhost", "127.0.0.1"])
def test_a_client_with_the_ca_trusts_the_server_under_each_of_its_names(made, name):
    assert handshake(made, name) == "TLSv1.3"


def test_a_client_does_not_trust_the_server_under_another_name(made):
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(made, "other.example.org")


def test_both_certificates_are_valid_for_the_days_asked_for(made):
    for path in (made / "ca" / "ca.crt", made / "server" / "server.pem"):
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        assert certificate.not_valid_before_utc < datetime.now(UTC)
        left = certificate.not_valid_after_utc - datetime.now(UTC)
        assert timedelta(days=30) - left < timedelta(minutes=10)


def test_flower_reads_the_key_pair_of_each_site(made):
    pairs = set()
    for site in ("site0", "site1"):
        private = load_ssh_private_key((made / site / "supernode.key").read_bytes(), None)  # as flower-supernode does
        assert uses_nist_ec_curve(private.public_key())
        assert private.key_size == 384
        pairs.add(try_load_public_key(made / site / "supernode.pub"))  # as `flwr supernode register` does
        assert public_key_to_bytes(private.public_key()) in pairs
    assert len(pairs) == 2


def test_each_machine_has_a_folder_and_only_owners_read_private_keys(made):
    modes = {
        str(path.relative_to(made)): stat.S_IMODE(path.stat().st_mode) for path in made.rglob("*") if path.is_file()
    }

    assert modes == {
        **{"ca/ca.crt": 0o644, "ca/ca.key": 0o600},
        **{"server/ca.crt": 0o644, "server/server.pem": 0o644, "server/server.key": 0o600},
        **{"site0/ca.crt": 0o644, "site0/supernode.pub": 0o644, "site0/supernode.key": 0o600},
        **{"site1/ca.crt": 0o644, "site1/supernode.pub": 0o644, "site1/supernode.key": 0o600},
    }
    folders = [made, *(path for path in made.iterdir())]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


def test_a_second_start_is_refused_and_changes_nothing(made):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in made.rglob("*") if path.is_file()}

    result = CliRunner().invoke(cli, ["certificates", str(made), "--host", "a", "--site", "site2"])

    assert isinstance(result.exception, CertificateError)
    assert "must be absent or empty" in str(result.exception)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in made.rglob("*") if path.is_file()} == before
    assert not (made / "site2").exists()


@pytest.mark.parametrize("host", ["https://a.org", "a.org:8443", "", "-a", "a b", "*"])
def test_what_is_no_host_is_refused_before_anything_is_written(tmp_path, host):
    with pytest.raises(CertificateError, match="--host must be"):
        make_certificates(tmp_path / "new", [host], ["site0"], days=1)

    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("sites", [["../x"], ["ca"], ["Site"], ["a", "a"], [""]])
def test_what_is_no_site_is_refused_before_anything_is_written(tmp_path, sites):
    with pytest.raises(CertificateError, match="--site must be"):
        make_certificates(tmp_path / "new", ["a"], sites, days=1)

    assert not (tmp_path / "new").exists()


def test_the_command_says_what_it_made_for_whom(tmp_path):
    result = CliRunner().invoke(cli, ["certificates", str(tmp_path / "c"), "--host", "a.org", "--site", "site0"])

    assert result.exit_code == 0
    assert result.output.splitlines() == [
        f"{tmp_path}/c/ca: ca.crt, ca.key",
        f"{tmp_path}/c/server: ca.crt, server.key, server.pem",
        f"{tmp_path}/c/site0: ca.crt, supernode.key, supernode.pub",
    ]
