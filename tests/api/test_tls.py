"""TLS with and without client certificates, and the CORS flags, on real servers."""

import shutil
import ssl
import subprocess

import httpx
import pytest

from tests.api.tiny import QUICK, RunningServer

ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(certificate, key) of 127.0.0.1, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    folder = tmp_path_factory.mktemp("certificates")
    names = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:TRUE"]
    subprocess.run([*command, "-out", names[0], "-keyout", names[1]], check=True, capture_output=True)
    return names


def context(certificate, with_client: bool) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(certificate[0]))
    if with_client:
        made.load_cert_chain(*map(str, certificate))
    return made


def test_tls_and_client_certificates(pair, certificate):
    cert, key = map(str, certificate)
    flags = ("--ssl-certfile", cert, "--ssl-keyfile", key, "--ssl-ca-certs", cert)
    server = RunningServer(pair, *flags, *QUICK)
    try:
        server.wait_listening()
        assert server.url.startswith("https://")
        with httpx.Client(verify=context(certificate, with_client=True)) as client:
            assert client.get(server.url + "/live").status_code == 200
            with pytest.raises(httpx.TransportError):
                client.get(server.url.replace("https", "http") + "/live")
        with pytest.raises(httpx.TransportError):
            httpx.get(server.url + "/live", verify=context(certificate, with_client=False))
    finally:
        assert server.stop() == 0


def test_cors_flags(pair):
    flags = ("--allowed-origins", ORIGIN, "--allowed-methods", "POST", "--allowed-headers", "authorization")
    with RunningServer(pair, *flags, *QUICK) as server:

        def preflight(origin: str, method: str) -> httpx.Response:
            headers = {"origin": origin, "access-control-request-method": method}
            return httpx.options(server.url + "/v1/completions", headers=headers)

        assert preflight(ORIGIN, "POST").headers["access-control-allow-origin"] == ORIGIN
        assert preflight(ORIGIN, "DELETE").status_code == 400
        assert "access-control-allow-origin" not in preflight("https://evil.example", "POST").headers
        refused = httpx.post(server.url + "/v1/completions", content=b"{", headers={"origin": ORIGIN})
        assert refused.status_code == 400 and refused.headers["access-control-allow-origin"] == ORIGIN
