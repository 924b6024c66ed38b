"""Targets of `benchmarks/fuzz.py` that read files: pictures, configs, tasks, run folders, model folders."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import envs  # noqa: F401  registers ours
from actors.images import decode_png, encode_png
from actors.trajectory import TrajectoryBatch, TrajectoryLog, UnreadableTrajectory
from benchmarks.fuzz import Target
from cluster.config.files import load_config, to_yaml
from cluster.errors import CosoError
from cluster.report.samples import influence_profiles, sample_episodes
from cluster.run.run_folder import RunFolder
from cluster.telemetry.metrics import read_metrics
from envs.android.device import DeviceError, decode_picture
from envs.android.tasks import read_task_file
from envs.png import UnreadableImage

ROOT = Path(__file__).resolve().parents[1]
DEEP = [b"[", b"{", b'{"a":', b"]", b"}"]
JSON_WORDS = [*DEEP, b'"', b"\\ud83d", b"\\u0000", b",", b":", b"null", b"true", b"1e999", b"NaN", b"9" * 5000, b"\\"]
YAML_WORDS = [*DEEP, b"&a ", b"*a ", b"<<: ", b"!!binary ", b"!!python/name:os.system ", b"? ", b"- ", b"\n  ", b": ",
              b"~", b"2026-01-01", b"0o17", b"1:30:00", b".nan", b'"\\ud83d"', b"\t", b"%TAG", b"---\n"]  # fmt: skip
PICTURE = np.indices((20, 30)).sum(axis=0)[:, :, None].repeat(3, axis=2).astype(np.uint8)
PNG = encode_png(PICTURE)


def png(folder: Path) -> Target:
    """PNG of devices, and of a run folder."""
    import io

    from PIL import Image, PngImagePlugin

    corpus = [PNG]
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "a" * 300, zip=True)
    for mode in ("P", "L", "1", "RGBA", "I;16"):
        stream = io.BytesIO()
        Image.fromarray(PICTURE).convert("L" if mode == "I;16" else mode).convert(mode).save(
            stream, "PNG", pnginfo=texts
        )
        corpus.append(stream.getvalue())

    def read(data: bytes) -> None:
        with suppress(UnreadableImage):
            assert decode_png(data).size > (0, 0)
        assert decode_picture(data, "a device").size

    words = [
        b"IHDR",
        b"IDAT",
        b"PLTE",
        b"tRNS",
        b"zTXt",
        b"iCCP",
        b"acTL",
        b"fcTL",
        b"IEND",
        b"\xff\xff\xff\xff",
        b"\0\0\0\0",
    ]
    return Target("png", corpus, words, read, (DeviceError,), 130_000)


def configs(folder: Path) -> Target:
    corpus = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    path = folder / "config.yaml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        config = load_config([path])
        path.write_text(to_yaml(config), encoding="utf-8")
        assert load_config([path]) == config

    return Target(
        "configs", corpus, [*YAML_WORDS, b"training:", b"updates: ", b"model: {path: x}"], read, (CosoError,), 4_000
    )


def overrides(folder: Path) -> Target:
    corpus = [b"training.updates=10", b"environment.kwargs={max_position: 7}", b"algorithm.name=ppo", b"seed=1"]

    def read(data: bytes) -> None:
        to_yaml(load_config([], [data.decode("utf-8", "surrogateescape")])).encode()

    return Target("overrides", corpus, [*YAML_WORDS, b".", b"=", b"environment."], read, (CosoError,), 8_000)


def tasks(folder: Path) -> Target:
    yamls = [path.read_bytes()[:1500] for path in sorted((ROOT / "configs/tasks").glob("*.yaml"))]
    checks = b"- instruction: Open it\n  checks: [{activity: com.android.settings}, {setting: global/a, value: 1}]\n"
    places = {True: folder / "tasks.yaml", False: folder / "tasks.txt"}

    def read(data: bytes) -> None:
        path = places[b"instruction" in data]
        path.write_bytes(data)
        assert read_task_file(path)

    corpus = [*yamls, checks, b"# errands\nOpen the clock\nSet an alarm\n"]
    words = [*YAML_WORDS, b"instruction: ", b"checks: "]
    return Target("tasks", corpus, words, read, (ValueError,), 8_000)


def metrics(folder: Path) -> Target:
    rows = [{"update": n, "evaluation/success": 0.5, "time/collect": 2.0, "policy/loss": None} for n in range(4)]
    path = folder / "metrics.jsonl"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        assert all(isinstance(row["update"], int) for row in read_metrics(path))

    corpus = ["".join(json.dumps(row) + "\n" for row in rows).encode()]
    return Target("metrics", corpus, [*JSON_WORDS, b"\n", b"\xe2\x80\xa8", b'"update": '], read, (), 20_000)


def run_records(folder: Path) -> Target:
    """The small JSON files of a run folder."""
    run = RunFolder(folder / "run")
    checkpoint = run.checkpoint_path(3)
    checkpoint.mkdir(parents=True)
    (run.path / "config.yaml").write_text("name: run\n", encoding="utf-8")
    progress = {"schema_version": 1, "update": 3, "environment_steps": 9, "wall_seconds": 1.5, "success_before": 0.5,
                "recoveries": {"actor": 1}, "steps_trained": 9, "steps_dropped": 0}  # fmt: skip
    corpus = [json.dumps(progress).encode(), b'{"1": {"taken": 32, "dropped": 0}, "2": {"taken": 64, "dropped": 1}}']

    def read(data: bytes) -> None:
        (checkpoint / "progress.json").write_bytes(data)
        run.steps.write_bytes(data)
        with suppress(CosoError):
            run.read_steps()
        run.read_progress(run.checkpoint_updates()[-1])

    words = [*JSON_WORDS, b'"update": ', b'"schema_version": 1']
    return Target("run records", corpus, words, read, (CosoError,), 8_000)


def _logged(folder: Path) -> TrajectoryLog:
    from actors.images import image_hash

    key = image_hash(PICTURE)
    rows = [
        {"run": "r", "episode": f"e{n // 3}", "environment": "coso/NumberLine-v0", "step": n % 3, "seed": n,
         "prompt": "Go.", "image": key, "prompt_ids": [1, 2], "response_ids": [3, 4],
         "behaviour_logprobs": [-0.5, -1.0],
         "policy_versions": [{"version": 1, "start": 0}], "utterance": '{"action": "+"}', "action": "+",
         "action_labels": [1], "valid": True, "reward": float(n % 2), "end_reason": "terminated" if n % 3 == 2 else "",
         "influence": [0.5, 0.25]}
        for n in range(9)
    ]  # fmt: skip
    log = TrajectoryLog(folder)
    log.write(1, TrajectoryBatch.from_rows(rows, {key: PNG}))
    return log


def trajectories(folder: Path) -> Target:
    """A batch, or the pictures, of a run folder that is damaged, read as the report does."""
    log = _logged(folder / "sound")
    files = {"batch_000001.parquet": b"", "images_000001.parquet": b""}
    files = {name: (log.folder / name).read_bytes() for name in files}
    plain = folder / "plain.parquet"
    pq.write_table(pq.read_table(log.batch_path(1)), plain, compression="none", use_dictionary=False)
    corpus = [*files.values(), plain.read_bytes()]
    damaged = folder / "damaged"

    def read(data: bytes) -> None:
        for name, whole in files.items():
            damaged.mkdir(exist_ok=True)
            (damaged / name).write_bytes(data if (b"png" in data) == name.startswith("images") else whole)
        samples, unread = sample_episodes(damaged, None)
        influence_profiles(damaged)
        assert samples or unread or not len(TrajectoryLog(damaged).read(1))

    words = [b"PAR1", b"\xff\xff\xff\xff", b"\0\0\0\0", b"coso.schema_version", b"reward", b"\x15\x04"]
    return Target("trajectories", corpus, words, read, (UnreadableTrajectory,), 3_000)


def model_folders(folder: Path) -> Target:
    """A model's folder with one file broken: the first byte names the file, the rest is what it then holds."""
    from actors.chat import ChatProcessor, NotAVisionLanguageModel
    from learner.supervised.default_model import DefaultModelOptions, make_default_vlm

    sound = folder / "sound-model"
    sizes = DefaultModelOptions(hidden=32, layers=2, image_size=64, vision_hidden=32, vision_layers=1, vocabulary=320)
    make_default_vlm(sound, ['{"thoughts": "so", "action": "+"}'], [PICTURE], sizes, seed=1)
    names = sorted(path.name for path in sound.iterdir() if path.suffix in (".json", ".jinja"))
    corpus = [bytes([number]) + (sound / name).read_bytes() for number, name in enumerate(names)]
    broken = folder / "broken-model"

    def read(data: bytes) -> None:
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(sound, broken)
        (broken / names[data[0] % len(names)] if data else broken / names[0]).write_bytes(data[1:])
        ChatProcessor(str(broken))

    words = [*JSON_WORDS, b"{{ ", b"{% for m in messages %}", b"image", b'"model_type": "qwen2_vl"', b"eos_token_id"]
    return Target("model folders", corpus, words, read, (NotAVisionLanguageModel,), 400)
