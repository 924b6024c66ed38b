"""A game of one's own: one class and its registration."""

import gymnasium
import numpy as np

from envs.base import TextActionEnv
from envs.prompts import answer_format, json_answer


class LightSwitch(TextActionEnv):
    """A lamp is on or off. Press the switch, or wait: the lamp has to be on afterwards."""

    action_words = ("press", "wait")  # what may follow `"action":`
    image_shape = (64, 64, 3)
    state_label_sizes = (2,)  # of what the picture shows; with it a small model is taught to see

    @property
    def prompt(self):
        return "Switch the lamp on. " + answer_format({"thoughts": "is the lamp on?"}, self.action_words)

    def state_labels(self):
        return np.array([self._lamp], np.int32)

    def expert_utterance(self, rng, noise=0.0, habit=""):  # for the warm start
        action = self.with_noise("wait" if self._lamp else "press", rng, noise, habit)
        return json_answer({"thoughts": f"the lamp is {'on' if self._lamp else 'off'}"}, action)

    def _set_state(self, state):  # begin an episode
        self._lamp = int(self.np_random.integers(2))

    def _act(self, action):  # "" where the answer named no action; returns reward, terminated, success
        self._lamp = 1 - self._lamp if action == "press" else self._lamp
        return (1.0 if self._lamp else -1.0), True, bool(self._lamp)

    def _picture(self):
        return np.full(self.image_shape, 230 if self._lamp else 30, np.uint8)


gymnasium.register("mine/LightSwitch-v0", entry_point=LightSwitch)
