"""Timeouts, TLS, retries, URLs and headers."""

import pytest

from turbo_client import TLS, AsyncClient, Client, RetryPolicy, Timeout


@pytest.mark.parametrize("values", [{"total": 0}, {"total": -1}, {"connect": 0}, {"status": float("inf")}])
def test_timeouts_are_positive(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Timeout"):
        Timeout(**values)


def test_a_number_limits_the_whole_generation() -> None:
    assert Client(timeout=5).timeout == Timeout(total=5)
    assert Client(timeout=None).timeout == Timeout(total=None)
    assert Client().timeout == Timeout()


@pytest.mark.parametrize("values", [{"max_attempts": 0}, {"initial_delay": -1}, {"max_delay": 0.1}, {"multiplier": 0}])
def test_retry_policies_make_sense(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="RetryPolicy"):
        RetryPolicy(**values)


def test_retry_delays_grow_to_their_bound() -> None:
    policy = RetryPolicy(initial_delay=1, multiplier=2, max_delay=5)
    for attempt, bound in ((1, 1), (2, 2), (3, 4), (4, 5), (50, 5)):
        assert all(bound / 2 <= policy.delay(attempt) <= bound for _ in range(50))


def test_certificate_and_key_come_together() -> None:
    with pytest.raises(ValueError, match="both or neither"):
        TLS(cert=b"-----BEGIN CERTIFICATE-----")


def test_files_without_pem_are_refused(tmp_path) -> None:
    (tmp_path / "ca.pem").write_text("not a certificate")
    with pytest.raises(ValueError, match=r"TLS\.ca: .*ca\.pem holds no PEM block"):
        Client(tls=TLS(ca=tmp_path / "ca.pem"))
    with pytest.raises(FileNotFoundError):
        Client(tls=TLS(ca=tmp_path / "absent.pem"))


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "https://host", "", "a host:8001", "h:1\n"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_urls_that_cannot_work_are_refused(kind: type, url: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        kind(url)


def test_url_scheme_of_grpc_is_understood() -> None:
    assert Client("grpc://host:8001/")._connection.target == "host:8001"
    assert Client("unix:/run/triton.sock")._connection.target == "unix:/run/triton.sock"


@pytest.mark.parametrize("values", [{"api_key": ""}, {"api_key": "a\nb"}, {"api_key": "ключ"}])
def test_unusable_keys_are_refused_without_showing_them(values: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"^api_key: must be printable ASCII and not empty$"):
        Client(**values)


@pytest.mark.parametrize("header", ["a b", "", "x:y", "grpc-timeout", "key-bin"])
def test_unusable_headers_are_refused(header: str) -> None:
    with pytest.raises(ValueError, match="api_key_header"):
        Client(api_key="k", api_key_header=header)


def test_secrets_stay_out_of_repr() -> None:
    tls = TLS(cert=b"-----BEGIN CERTIFICATE-----", key=b"-----BEGIN SECRET-----")
    client = Client(api_key="s3cret")
    shown = repr(tls) + repr(client) + repr(client._connection)
    assert "SECRET" not in shown
    assert "s3cret" not in shown
