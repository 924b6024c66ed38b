"""The settings of rollouts and policy servers, and of the model that they serve."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from envs.settings import Count, Probability, Section, Share

#: How new weights travel to the engines; see `actors.serving.weight_transfer`.
Transport = Literal["shared_memory", "object_store", "nccl", "gloo"]
#: Which linear layers of a model get low-rank adapters: the text decoder's, or all but the output head.
AdapterTarget = Literal["language_model", "all-linear"]


class ModelSettings(Section):
    """The policy: any Hugging Face vision-language model with a chat template."""

    path: str = Field(
        "models/default", description="Folder or hub name of the model to start from (a warm start writes one)."
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision of engine and learner.")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = Field(
        "auto",
        description="What the learner computes attention with; the engine has its own. auto: sdpa (PyTorch's) where "
        "the model's family supports it, else eager. Flash attention needs its package, a GPU and bfloat16.",
    )
    value_hidden: tuple[PositiveInt, ...] = Field(
        (1024, 512), description="Hidden widths of the value head (MLP with ReLU on the last prompt token)."
    )
    value_attention: PositiveInt | None = Field(
        None,
        multiple_of=4,
        description="Width of one layer of attention over the whole prompt, which the value head then reads too; a "
        "multiple of 4. null: the last prompt token only (published).",
    )


class RolloutSettings(Section):
    """How many environments run, and how answers are sampled."""

    workers: PositiveInt = Field(1, description="Rollout workers (Ray actors).")
    envs_per_worker: PositiveInt = Field(8, description="Environments each worker drives at once.")
    temperature: PositiveFloat = Field(1.0, description="Sampling temperature (published for cards: 0.2).")
    max_new_tokens: PositiveInt = Field(256, description="Longest answer, tokens.")
    stream_bytes: PositiveInt = Field(
        64 << 20, description="Trajectories that may wait for the learner, bytes; rollouts wait while it is full."
    )
    silence_deadline_s: PositiveFloat = Field(
        300.0,
        description="The run stops with an error when it waits for episodes, and no environment has made a step for "
        "so long, seconds. A batch or an evaluation as a whole may take longer.",
    )
    max_failed_episodes: Probability = Field(
        0.5,
        description="The run stops with an error when more than this share of a worker's latest 50 episodes failed: "
        "their environment failed, or a request was refused (a prompt too long, an image that the model does not "
        "take). 1: never.",
    )


#: KV cache of an engine on CPUs where the config says nothing.
CPU_KV_CACHE_BYTES = 32 << 20


class PolicyServerSettings(Section):
    """The vLLM engines that serve the policy."""

    replicas: PositiveInt = Field(1, description="Policy servers (Ray actors, one vLLM engine each).")
    tensor_parallel: PositiveInt = Field(1, description="GPUs each engine spreads over.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where the engines run.")
    threads: PositiveInt | None = Field(
        None,
        description="CPU threads of an engine, which process its images on cuda. null: 4 on cuda; 1 on cpu, where more "
        "make it ten times slower beside any other load.",
    )
    gpu_share: Share = Field(1.0, description="Share of a GPU that one server takes; below 1, others may share it.")
    max_model_len: PositiveInt = Field(1024, description="Longest prompt plus answer, tokens.")
    max_concurrent_requests: PositiveInt = Field(64, description="Requests an engine runs at once.")
    kv_cache_bytes: PositiveInt | None = Field(
        None,
        description="KV cache of an engine, bytes on each of its GPUs. null: 32 MiB on cpu; on cuda what "
        "`gpu_memory_utilization` leaves, measured at the start, which is wrong where others take or free memory of "
        "the same GPU meanwhile: say it there.",
    )
    gpu_memory_utilization: Probability = Field(0.85, description="Share of GPU memory an engine takes.")
    sleep: bool = Field(
        False,
        description="Give the GPU memory back while the learner trains, for mode sync on a shared GPU. The weights are "
        "in host memory meanwhile.",
    )
    start_deadline_s: PositiveFloat = Field(
        600.0,
        description="Deadline for an engine to start, seconds. On a GPU, vLLM compiles the model at its first start.",
    )
    generate_deadline_s: PositiveFloat = Field(
        120.0,
        description="A server that has requests and gives no answer for so long fails them, seconds. A whole batch, or "
        "a request that waits for its turn, may take longer.",
    )

    @model_validator(mode="after")
    def _only_gpus_share_a_model(self) -> PolicyServerSettings:
        if self.tensor_parallel > 1 and self.device == "cpu":
            raise ValueError("policy_server.tensor_parallel > 1 needs policy_server.device cuda")
        if self.tensor_parallel > 1 and self.gpu_share < 1:
            raise ValueError("policy_server.tensor_parallel > 1 needs whole GPUs: policy_server.gpu_share must be 1")
        if self.sleep and self.device == "cpu":
            raise ValueError("policy_server.sleep needs policy_server.device cuda: vLLM's engines on CPUs cannot sleep")
        return self

    @property
    def stated_kv_cache_bytes(self) -> int | None:
        """Bytes of KV cache; None: as much as there is room for."""
        return self.kv_cache_bytes or (CPU_KV_CACHE_BYTES if self.device == "cpu" else None)

    @property
    def gpus(self) -> float:
        """GPUs that one server takes."""
        return self.tensor_parallel * self.gpu_share if self.device == "cuda" else 0.0

    @property
    def answer_deadline_s(self) -> float:
        """Longest wait without any answer of a server, seconds, when it may have to be restarted first."""
        return self.start_deadline_s + self.generate_deadline_s


class WeightSyncSettings(Section):
    """How new weights reach the live engines."""

    transport: Literal["auto", Transport] = Field(
        "auto",
        description="shared_memory: a file in the node's memory; object_store: through Ray, for several nodes; "
        "nccl: GPU to GPU; gloo: the same collective on CPU. auto: nccl on GPUs, unless only adapters travel "
        "(learner.lora); else shared_memory on one node, else object_store.",
    )
    deadline_s: PositiveFloat = Field(
        120.0, description="Deadline for the next server to have swapped, seconds; each answer starts it again."
    )
    check_every: Count = Field(
        1,
        description="After every n-th swap, compare a live engine's log-probabilities with the learner's, at the "
        "least certain tokens of answers to some prompts of the last batch; 0: never.",
    )
    check_tolerance: PositiveFloat | None = Field(
        None,
        description="Largest mean |difference| of a log-probability × `rollout.temperature` in that check, and "
        "largest KL(engine ‖ learner) × its square, before the run stops. null: 0.02 in float32, 0.1 in bfloat16.",
    )

    def transport_for(self, *, on_gpus: bool, nodes: int) -> Transport:
        """The transport to use, with `auto` decided. on_gpus: whether the learner and every engine run on GPUs;
        nodes: of the cluster."""
        if self.transport != "auto":
            return self.transport
        if on_gpus:
            return "nccl"
        return "shared_memory" if nodes == 1 else "object_store"
