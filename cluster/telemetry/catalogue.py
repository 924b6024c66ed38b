"""All metrics in `metrics.jsonl`: name, meaning and format.

`docs/metrics.md` is generated from this list, and the console and the report take their labels and formats from it.
A key with a `*` stands for a family of keys, such as the memory of every actor.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Literal

Form = Literal["share", "number", "count", "seconds", "bytes", "mebibytes", "rate"]


@dataclass(frozen=True, slots=True)
class Metric:
    """key: as in `metrics.jsonl`; label: for tables and axes; form: how values are formatted; meaning: one sentence."""

    key: str
    label: str
    form: Form
    meaning: str


_RUN = (
    Metric("update", "update", "count", "Policy updates so far; row 0 is the evaluation before training."),
    Metric(
        "environment_steps",
        "environment steps",
        "count",
        "Steps that environments made in training episodes so far, also of episodes dropped, cut off or unfinished.",
    ),
    Metric("steps/trained", "steps trained on", "count", "Of these, steps trained on so far."),
    Metric(
        "steps/dropped",
        "steps dropped",
        "count",
        "Of these, steps not trained on so far, since older than `max_policy_lag`.",
    ),
    Metric("recoveries", "recoveries", "count", "Restarts of processes so far, of all kinds."),
    Metric("failures/*", "failed episodes", "count",
           "Episodes that failed for this reason since their rollout worker started, also those without a whole step."),
)  # fmt: skip

_EPISODES = (
    ("success", "success", "share", "Share of episodes with a return above 0 (the published measure)."),
    ("task_success", "task success", "share", "Share of episodes that the environment reports as a success."),
    ("return", "return", "number", "Mean undiscounted sum of rewards."),
    ("valid_rate", "valid answers", "share", "Share of answers that parse to an action."),
    ("episodes", "episodes", "count", "Episodes."),
    ("environment_failures", "environment failures", "count",
     "Episodes cut off because their environment died, hung, raised or returned nonsense; no rate includes them."),
    ("prompt_too_long", "prompts too long", "count",
     "Episodes cut off by a prompt longer than `policy_server.max_model_len`; no rate includes them."),
    ("image_refused", "images refused", "count",
     "Episodes cut off by an image that the model's processor refuses; no rate includes them."),
    ("request_refused", "requests refused", "count",
     "Episodes cut off by a request that the engine refuses for another reason; no rate includes them."),
    ("steps", "steps", "count", "Steps."),
    ("episode_length", "episode length", "number", "Mean steps of an episode."),
    ("response_tokens", "answer length", "number", "Mean tokens of an answer."),
    ("cut_off_rate", "answers cut off", "share", "Share of answers that reached `rollout.max_new_tokens`."),
)  # fmt: skip

_LEARNER = (
    Metric("learner/policy_loss", "policy loss", "number", "Clipped surrogate, negated; mean over steps."),
    Metric("learner/value_loss", "value loss", "number",
           "Half the squared error of the value, in deviations of the return; mean."),
    Metric("learner/entropy", "entropy", "number",
           "Mean over steps of Σ H_i / n: entropy per token over the whole vocabulary, nats."),
    Metric("learner/weighted_entropy", "weighted entropy", "number",
           "Mean over steps of Σ B_i H_i / n, nats per token; B_i is the weight that `entropy.mode` gives token i."),
    Metric("learner/entropy_weight", "entropy weight", "number",
           "Mean over steps of Σ B_i / n; weighted entropy over this is nats per deciding token."),
    Metric("learner/entropy_bonus", "entropy bonus", "number",
           "What the entropy term adds to the objective: α Σ B_i H_i / n."),
    Metric("learner/entropy_coefficient", "entropy coefficient", "number", "α after the update."),
    Metric("learner/entropy_gradient_share", "entropy's gradient", "number",
           "Gradient norm of the entropy term over that of the policy loss, at the update's first optimizer step."),
    Metric("learner/part_norm_*", "gradient norm of a part", "number",
           "Gradient norm of one part of the loss (policy, entropy) at that step."),
    Metric("learner/approx_kl", "KL to the sampling policy", "number",
           "KL(sampling ‖ current) of an answer during the update, k3 estimator, nats."),
    Metric("learner/update_kl", "KL to the update's start", "number",
           "KL(policy as the update began ‖ current) of an answer during the update, k3 estimator, nats."),
    Metric("learner/clip_fraction", "clip fraction", "share", "Share of steps whose ratio left the clip range."),
    Metric("learner/importance_weight", "importance weight", "number",
           "Mean weight of a step: proximal over behaviour policy, truncated (`algorithm.importance`)."),
    Metric("learner/importance_beyond_limit", "weights at the limit", "share",
           "Share of steps whose weight was truncated or masked."),
    Metric("learner/ratio_max", "largest ratio", "number", "Largest ratio of a step in the update."),
    Metric("learner/mismatch_tokens", "mismatch tokens", "count",
           "Tokens sampled with the learner's current weights; the mismatch is measured on these."),
    Metric("learner/mismatch_mean", "mismatch, mean", "number",
           "Mean |Δ log-probability| between engine and learner under the same weights, nats."),
    Metric("learner/mismatch_max", "mismatch, largest", "number", "Largest such |Δ|, nats."),
    Metric("learner/mismatch_kl", "mismatch, KL", "number", "Estimated KL(engine ‖ learner) per token, nats."),
    Metric("learner/drift_mean", "drift, mean", "number",
           "Mean |Δ log-probability| between the weights that sampled a token and the learner's, before the update."),
    Metric("learner/drift_max", "drift, largest", "number", "Largest such |Δ|, nats."),
    Metric("learner/drift_kl", "drift, KL", "number", "Estimated KL(sampled ‖ learner before the update), nats."),
    Metric("learner/explained_variance", "explained variance", "number",
           "1 − Var(return − value) / Var(return): 1 is a perfect critic, 0 predicts only the mean."),
    Metric("learner/value_calibration_error", "value calibration error", "number",
           "Mean distance, over ten bins of about equally many values, of a bin's mean value from its mean return, in "
           "units of reward; the return is what followed, discounted, plus the value where an episode was cut off."),
    Metric("learner/value_calibration_deviations", "value calibration error, relative", "number",
           "The same in deviations of these returns; with n steps in a bin, noise alone makes about 0.8 / √n."),
    Metric("learner/gradient_norm", "gradient norm", "number", "Mean over optimizer steps, before clipping."),
    Metric("learner/gradient_norm_max", "gradient norm, largest", "number", "Largest over optimizer steps."),
    Metric("learner/head_gradient_norm", "value head's gradient norm", "number", "Mean over optimizer steps."),
    Metric("learner/head_gradient_norm_max", "value head's gradient norm, largest", "number", "Largest of them."),
    Metric("learner/skipped_steps", "optimizer steps left out", "count",
           "Optimizer steps that moved no weight, since a gradient was not finite."),
    Metric("learner/too_old", "steps too old", "share",
           "Share of the batch's steps that give context only: a token is older than `max_policy_lag` versions."),
    Metric("learner/learning_rate", "learning rate", "number", "Of the policy in this update."),
    Metric("learner/optimizer_steps", "optimizer steps", "count", "In this update."),
    Metric("learner/return_mean", "mean return target", "number", "Mean return of the steps, in units of reward."),
    Metric("learner/value_mean", "mean value", "number", "Mean value before the update, in units of reward."),
)  # fmt: skip

_SCORING = (
    Metric("influence/mean", "influence, mean", "number", "Mean influence of a token, in [0, 1]."),
    Metric("influence/max", "influence, largest", "number", "Largest influence of a token."),
    Metric("influence/nonzero", "influence, nonzero", "share", "Share of tokens whose influence is above 0."),
    Metric("influence/top_decile", "influence, top tenth", "share",
           "Share of an answer's influence on its most influential tenth of tokens: 0.1 if even, 1 if on few tokens."),
    Metric("scm/accuracy", "SCM accuracy", "share",
           "Share of new answers whose action the SCM predicts, before training on them."),
    Metric("scm/ece", "SCM calibration error", "number", "Expected calibration error of that prediction."),
    Metric("scm/unseen", "answers new to the SCM", "count", "New answers that are not in the SCM's buffer."),
    Metric("scm/unseen_accuracy", "SCM accuracy, unseen", "share", "Accuracy on answers it was never trained on."),
    Metric("scm/unseen_ece", "SCM calibration error, unseen", "number", "Expected calibration error on these."),
    Metric("scm/unscaled_ece", "SCM calibration error, unscaled", "number",
           "The error on new answers without the temperature (`scoring.scm.temperature_scaling`)."),
    Metric("scm/temperature", "SCM temperature", "number", "What the logits are divided by from this version on."),
    Metric("scm/held_out", "answers held out", "count", "Answers kept out of training, to fit it on."),
    Metric("scm/confidence", "SCM confidence", "number", "Mean probability of the action labels it predicts."),
    Metric("scm/loss", "SCM loss", "number", "Cross-entropy over the sampled answers, nats."),
    Metric("scm/new_loss", "SCM loss on new answers", "number", "Cross-entropy before training on them, nats."),
    Metric("scm/version", "SCM version", "count", "Number of SCM trainings so far."),
    Metric("scm/buffer", "SCM buffer", "count", "Answers in the SCM's buffer."),
    Metric("scm/new", "SCM new answers", "count", "Answers of this update that parsed."),
    Metric("scm/steps", "SCM steps", "count", "Optimizer steps in this update."),
    Metric("scoring/utterances", "answers scored", "count", "Answers of this update."),
    Metric("scoring/distinct", "distinct answers", "count", "Different (answer, action) pairs; each is scored once."),
    Metric("cache/hits", "scores remembered", "count", "Distinct pairs whose score was in the cache."),
    Metric("cache/hit_rate", "scored once before", "share",
           "Share of answers that needed no scorer: repeated in the batch, or in the cache."),
    Metric("cache/counterfactuals", "counterfactuals", "count",
           "Counterfactuals evaluated for the other answers: windows nulled one at a time."),
    Metric("scoring/approximated", "too long answers", "count",
           "Distinct answers of more than `scoring.longest_exact` tokens, scored by gradient."),
    Metric("scoring/version", "SCM version used", "count",
           "Version of the SCM that scored the answers; in async mode it scores while the next version is trained."),
    Metric("fidelity/spearman", "agreement with the parser", "number",
           "Spearman's rank correlation of the SCM's influence with the parser's exact one, over the tokens that can "
           "count; mean over answers where the parser finds a difference between tokens."),
    Metric("fidelity/top_overlap", "parser's tokens found", "share",
           "Of the k tokens whose removal changes the parsed action: the share among the SCM's top k."),
    Metric("fidelity/action_mass", "influence on the action part", "share",
           'Share of an answer\'s influence (by the SCM) from `"action":` on; the rest is on its thoughts.'),
    Metric("fidelity/gradient_spearman", "gradient, agreement", "number",
           "Spearman's rank correlation of the gradient's influence with the SCM's."),
    Metric("fidelity/temperature_change", "change by temperature", "number",
           "Mean |Δ influence| that the SCM's temperature makes, over the tokens that can count."),
    Metric("fidelity/utterances", "answers compared", "count", "Distinct answers in these means, at most."),
)  # fmt: skip

_CALIBRATION = (
    Metric("policy/ece", "policy calibration error", "number",
           "Expected calibration error of the policy's confidence in its action as a forecast of success: the share of "
           "the other answers to the same prompt and image with this action, against a return above 0."),
    Metric("policy/confidence", "policy confidence", "share", "Mean of this confidence."),
    Metric("policy/repeated", "steps repeated", "count",
           "Steps whose prompt and image occur at least 4 times in the batch; the two above are over these."),
    Metric("policy/reliability_*", "policy reliability", "number",
           "Points of the curve behind `policy/ece`, one per bin that is not empty: `_predicted` (mean confidence), "
           "`_observed` (share of successes) and `_count` (steps)."),
    Metric("learner/reliability_*", "value reliability", "number",
           "The same for `learner/value_calibration_error`: mean value, mean return, steps."),
    Metric("scm/reliability_*", "SCM reliability", "number",
           "The same for `scm/ece`: mean confidence, share of right predictions, answers."),
)  # fmt: skip

_FLOW = (
    Metric("lag/mean", "lag, mean", "number",
           "Mean number of versions between the weights that sampled a step trained on and those trained."),
    Metric("lag/max", "lag, largest", "count", "Largest such lag."),
    Metric("lag/dropped_steps", "steps too old", "count",
           "Steps of episodes dropped for this update: every step is older than `max_policy_lag`."),
    Metric("queue/steps", "queue, steps", "count", "Steps waiting for the learner."),
    Metric("queue/episodes", "queue, episodes", "count", "Episodes waiting for the learner."),
    Metric("queue/bytes", "queue", "bytes", "Bytes waiting for the learner."),
    Metric("bytes/batch", "batch", "bytes", "Bytes of the update's steps and images."),
    Metric("bytes/log", "log", "bytes", "Bytes written to `trajectories/` for this update."),
    Metric("sync_check/max_difference", "weight sync check", "number",
           "Largest |Δ log-probability| between a live engine and the learner right after a weight swap, at the least "
           "certain tokens, nats."),
    Metric("sync_check/mean_difference", "weight sync check, mean", "number",
           "Mean |Δ log-probability| of the same check, nats."),
    Metric("sync_check/kl", "weight sync check, KL", "number",
           "KL(engine ‖ learner) of the same check, k3 estimator, nats."),
    Metric("sync_check/previous_difference", "weight sync check, version before", "number",
           "Mean |Δ log-probability| of the engine's answers in the check before, by the learner's new weights, nats."),
    Metric("sync_check/tokens", "weight sync check, tokens", "count", "Tokens that the check looked at."),
)  # fmt: skip

_MACHINE = (
    Metric("time/collect", "collect", "seconds", "Time to collect the update's batch."),
    Metric("time/wait", "wait", "seconds",
           "Time the loop waited for the batch; in async mode the part that did not overlap."),
    Metric("time/score", "score", "seconds", "Training the SCM and scoring the batch."),
    Metric("time/scorers_busy", "scorers busy", "seconds", "Sum of the busy time of all scorers."),
    Metric("time/update", "update", "seconds", "Time of the learner's update."),
    Metric("time/publish", "publish", "seconds", "Time to load new weights into every engine."),
    Metric("time/swap", "swap", "seconds", "The slowest engine's share of the publish time."),
    Metric("time/sync_check", "sync check", "seconds", "Comparing a live engine with the learner."),
    Metric("time/evaluate", "evaluate", "seconds", "Evaluation on the held-out seeds."),
    Metric("time/evaluation_wait", "evaluation wait", "seconds",
           "Async mode: time that new weights were held back until the evaluation of those before was over."),
    Metric("time/checkpoint", "checkpoint", "seconds", "Writing the checkpoint."),
    Metric("time/total", "whole update", "seconds", "Wall time of the update; in async mode stages overlap."),
    Metric("mean_seconds/generate", "one answer", "seconds", "Mean time from request to answer."),
    Metric("mean_seconds/environment", "one environment step", "seconds", "Mean time of a step or reset."),
    Metric("speed/tokens_per_s", "tokens/s", "rate", "Generated tokens of the batch / wall time of the update."),
    Metric("speed/env_steps_per_s", "env steps/s", "rate", "Environment steps of the batch / wall time of the update."),
    Metric("busy/policy_servers", "servers busy", "share", "Share of wall time in which a policy server had requests."),
    Metric("busy/environments", "environments busy", "share",
           "Share of wall time in which an environment was stepping."),
    Metric("busy/learner", "learner busy", "share", "Share of wall time in which the learner was updating."),
    Metric("busy/scorers", "scorers busy", "share", "Share of wall time in which a scorer was scoring."),
    Metric("memory/driver_mb", "memory, driver", "mebibytes", "Resident memory of the driver."),
    Metric("memory/host_used_mb", "memory, host", "mebibytes", "Memory in use on the driver's machine."),
    Metric("memory/*_mb", "memory of an actor", "mebibytes", "Resident memory of each watched actor."),
)  # fmt: skip


def _of_episodes(prefix: str, of: str) -> tuple[Metric, ...]:
    return tuple(
        Metric(f"{prefix}/{name}", label, form, f"{of}: {meaning[0].lower()}{meaning[1:]}")  # type: ignore[arg-type]
        for name, label, form, meaning in _EPISODES
    )


#: Section title -> its metrics, in the order of the documentation.
SECTIONS: dict[str, tuple[Metric, ...]] = {
    "The run": _RUN,
    "Evaluation on held-out seeds": _of_episodes("evaluation", "Held-out episodes"),
    "Rollouts trained on": _of_episodes("rollout", "The update's batch"),
    "Learner": _LEARNER,
    "Scoring": _SCORING,
    "Calibration": _CALIBRATION,
    "Flow of data": _FLOW,
    "Time, speed, memory": _MACHINE,
}


@cache
def describe(key: str) -> Metric:
    """The catalogue's entry for a key, also of a family; for an unknown key, an entry with the key as label."""
    entries = [metric for section in SECTIONS.values() for metric in section]
    for metric in entries:
        if metric.key == key:
            return metric
    for metric in entries:
        if "*" in metric.key and fnmatchcase(key, metric.key):
            return metric
    return Metric(key, key, "number", "")


def show(key: str, value: float | None) -> str:
    """The value as text, formatted for its key; a dash for None."""
    if value is None:
        return "–"
    match describe(key).form:
        case "share":
            return f"{value:.3f}"
        case "count":
            return f"{value:,.0f}"
        case "seconds":
            return f"{value:.1f} s" if value >= 1 else f"{value * 1000:.0f} ms"
        case "rate":
            return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
        case "bytes":
            return mebibytes(value / 2**20)
        case "mebibytes":
            return mebibytes(value)
    return f"{value:.3g}"


def mebibytes(value: float) -> str:
    """A size in MiB as text with a suitable unit."""
    if value >= 1024:
        return f"{value / 1024:.1f} GiB"
    return f"{value:.0f} MiB" if value >= 10 else f"{value * 1024:.0f} KiB"
