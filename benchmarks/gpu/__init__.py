"""What only a GPU can answer: one script per question, each a table and a JSON file with the card's name.

    python -m benchmarks.gpu.learner      updates on CUDA against the CPU's, by precision, ZeRO stage and adapters
    python -m benchmarks.gpu.token_head   memory and time of log-probabilities at a vocabulary of 151,936
    python -m benchmarks.gpu.scorer       the scorer against the published procedure and against a CPU
    python -m benchmarks.gpu.server       the policy server: log-probabilities, a swap in flight, tokens per second
    python -m benchmarks.gpu.nccl         the weight transfer between GPUs
    python -m benchmarks.gpu.one_gpu      NumberLine trained in bf16, server and learner on one GPU
    python -m benchmarks.gpu.large_learner  an update of 2 billion weights: time, memory, FLOPs, images, publishing
    python -m benchmarks.gpu.large_engine   2 billion weights served: tokens, images, weight swap

Each is made for under three minutes; `nccl` needs two GPUs. Results go to `benchmarks/results/gpu/`; a script that has
not run has none. With `--device cpu` a script rehearses on a small scale where there is no GPU; it then writes nothing
unless `--out` is given. `COMMIT` names the code where it is no git checkout. `docs/gpu.md` says what was run.
"""
