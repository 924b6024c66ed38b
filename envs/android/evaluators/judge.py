"""`judge`: a vision-language model at an OpenAI-compatible endpoint decides whether a screen accomplishes the task.

The endpoint may be `coso serve` or any other with `POST /chat/completions` and images. The published evaluator (of
DigiRL) asks one question about the last screen, after examples.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import re
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tenacity import RetryError, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from envs.android.evaluators.base import ACCOMPLISHED, NOT_YET, Evaluator, EvaluatorError, Moment, Verdict
from envs.android.loopback import open_url
from envs.http import read_within, refusal

_INSTRUCTIONS = (
    "You judge whether a phone has reached the goal of a task. You see screenshots, the latest last. Reach your "
    "verdict from what the screens show and nothing else. Answer in two lines: first one sentence on what you see, "
    "then exactly 'Status: success' or 'Status: failure'."
)
#: Examples: task, content of the last screen, answer. They show the answer's form.
_EXAMPLES = (
    ("Turn on Wi-Fi", "Settings, Network & internet, a switch beside Wi-Fi that is off", "failure"),
    ("Set an alarm for 07:30", "Clock with the tab Alarm, a row 07:30 whose switch is on", "success"),
    ("Go to example.com and search for lamp", "the start page of example.com with an empty search field", "failure"),
)
_STATUS = re.compile(r"^\W{0,4}status\W{1,6}(success|failure)\b", re.IGNORECASE | re.MULTILINE)
_LARGEST_ANSWER = 1 << 20
_RETRIED_CODES = {408, 409, 425, 429, 500, 502, 503, 504}


class TryAgain(Exception):
    """A failure that may be temporary: the network, an overloaded server, an answer without a verdict."""


class JudgeEvaluator(Evaluator):
    """Asks the endpoint once per task and screens; verdicts are cached."""

    def __init__(
        self,
        url: str,
        model: str,
        api_key_variable: str = "OPENAI_API_KEY",
        screens: int = 2,
        deadline_s: float = 60.0,
        attempts: int = 4,
        backoff_s: float = 1.0,
        max_tokens: int = 128,
        cache_size: int = 4096,
    ) -> None:
        """url: of the API, for instance http://127.0.0.1:8000/v1; api_key_variable: the environment variable that holds
        the key (sent if it is set, never logged); screens: number of latest screens shown; deadline_s: of one request;
        attempts: total number, with waits that start at backoff_s and double; cache_size: verdicts in the cache."""
        if not re.fullmatch(r"https?://[^\s]+", url):
            raise ValueError(f"judge: url must begin with http:// or https://, not {url!r}")
        if screens < 1 or attempts < 1:
            raise ValueError("judge: screens and attempts must be at least 1")
        self._url = url.rstrip("/") + "/chat/completions"
        self._model = model
        self._key = os.environ.get(api_key_variable, "")
        self._screens = screens
        self._deadline_s = deadline_s
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._max_tokens = max_tokens
        self._cache_size = cache_size
        self._verdicts: OrderedDict[str, bool] = OrderedDict()
        #: Requests sent, and verdicts from the cache.
        self.asked = self.remembered = 0

    def verdict(self, moment: Moment) -> Verdict:
        shown = moment.screens[-self._screens :]
        key = _key(moment.task.instruction, shown)
        if key in self._verdicts:
            self.remembered += 1
            self._verdicts.move_to_end(key)
        else:
            self._verdicts[key] = self._ask(moment.task.instruction, shown)
            if len(self._verdicts) > self._cache_size:
                self._verdicts.popitem(last=False)
        return ACCOMPLISHED if self._verdicts[key] else NOT_YET

    def _ask(self, instruction: str, screens: Sequence[NDArray[np.uint8]]) -> bool:
        body = json.dumps(self._request(instruction, screens)).encode()
        retrying = Retrying(
            stop=stop_after_attempt(self._attempts),
            wait=wait_exponential_jitter(self._backoff_s, max=30.0, jitter=self._backoff_s / 4),
            retry=retry_if_exception_type(TryAgain),
        )
        try:
            return retrying(self._ask_once, body)
        except RetryError as error:
            cause = error.last_attempt.exception()
            raise EvaluatorError(f"the judge at {self._url} failed {self._attempts} times; last: {cause}") from cause

    def _ask_once(self, body: bytes) -> bool:
        self.asked += 1
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, body, headers)
        try:
            with open_url(request, self._deadline_s) as response:
                answer = read_within(response, self._deadline_s, _LARGEST_ANSWER)
        except urllib.error.HTTPError as error:
            said = refusal(error, 500).decode("utf-8", "replace")
            if error.code in _RETRIED_CODES:
                raise TryAgain(f"HTTP {error.code}: {said}") from error
            raise EvaluatorError(f"the judge at {self._url} refuses: HTTP {error.code}: {said}") from error
        except (OSError, http.client.HTTPException) as error:
            raise TryAgain(f"{type(error).__name__}: {error}") from error
        return read_status(answer)

    def _request(self, instruction: str, screens: Sequence[NDArray[np.uint8]]) -> dict[str, Any]:
        messages: list[dict[str, Any]] = [{"role": "system", "content": _INSTRUCTIONS}]
        for task, seen, status in _EXAMPLES:
            messages.append({"role": "user", "content": f"Task: {task}\nThe last screen shows: {seen}"})
            messages.append({"role": "assistant", "content": f"It shows {seen}.\nStatus: {status}"})
        pictures = [{"type": "image_url", "image_url": {"url": _data_url(screen)}} for screen in screens]
        messages.append({"role": "user", "content": [{"type": "text", "text": f"Task: {instruction}"}, *pictures]})
        return {"model": self._model, "messages": messages, "max_tokens": self._max_tokens, "temperature": 0}


def read_status(answer: bytes) -> bool:
    """Whether a chat completion, as JSON, says success. Raises `TryAgain` without exactly one status line."""
    try:
        text = json.loads(answer)["choices"][0]["message"]["content"]
        found = _STATUS.findall(text)
    except (ValueError, LookupError, TypeError, RecursionError) as error:  # the last one: JSON that is nested deeply
        raise TryAgain(f"the answer is not a chat completion: {answer[:200]!r}") from error
    if len({status.lower() for status in found}) != 1:
        raise TryAgain(f"the answer does not have exactly one status line: {text[:200]!r}")
    return bool(found[0].lower() == "success")


def _key(instruction: str, screens: Sequence[NDArray[np.uint8]]) -> str:
    digest = hashlib.sha256(instruction.encode("utf-8", "surrogatepass"))
    for screen in screens:
        digest.update(repr(screen.shape).encode())
        digest.update(np.ascontiguousarray(screen).tobytes())
    return digest.hexdigest()


def _data_url(screen: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(screen).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
