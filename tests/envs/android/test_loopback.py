"""What goes through a proxy and what does not."""

import urllib.request

import pytest

from envs.android.appium import AppiumPhone
from envs.android.browser import BrowserPhone
from envs.android.evaluators.judge import JudgeEvaluator
from envs.android.loopback import is_loopback, open_url
from tests.envs.android.appium_stand_in import AppiumStandIn
from tests.envs.android.test_evaluators import Endpoint, completion, moment

#: Nothing listens there.
PROXY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, PROXY)
        monkeypatch.setenv(name.upper(), PROXY)
    for name in ("no_proxy", "NO_PROXY", "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)
    # urllib reads the variables once a process, and other tests may have called it.
    monkeypatch.setattr(urllib.request, "_opener", None)


def test_the_judge_on_this_machine_is_asked_directly() -> None:
    endpoint = Endpoint()
    endpoint.answers = [completion("It is done.\nStatus: success")]
    try:
        assert JudgeEvaluator(endpoint.url, "judge", attempts=1).verdict(moment(1)).success
    finally:
        endpoint.server.shutdown()
        endpoint.server.server_close()


def test_appium_on_this_machine_is_asked_directly(browser_phone: BrowserPhone) -> None:
    server = AppiumStandIn(browser_phone, seed=3)
    phone = AppiumPhone("device", server.url, settle_s=0)
    assert phone.screenshot().any()
    phone.close()
    server.close()


def test_another_machine_is_asked_through_the_proxy() -> None:
    # Nothing listens at the proxy's port; without a proxy, the name could not be resolved.
    with pytest.raises(OSError, match="Connection refused"):
        open_url(urllib.request.Request("http://judge.invalid/v1"), 5.0)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "a.localhost", "127.0.0.1", "127.8.8.8", "::1", "0.0.0.0"])
def test_names_of_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "localhost.example.org", "10.0.0.1", "127.example.org", "example.org"])
def test_names_of_others(host: str) -> None:
    assert not is_loopback(host)
