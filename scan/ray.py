# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""The same scan on Ray Data: pictures are read anywhere in the cluster, an actor for each GPU holds one engine.

Ray starts a lost actor again and gives it what it had not answered. A chunk of pictures comes back whole, and only the
process that called `scan_on_ray` keeps records, so nothing is lost or there twice.
"""

import os
import pickle
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any

from .records import Record
from .sources import Item, read_items
from .workers import WORKERS, Interviewer, ahead

CHUNK = 16  # pictures that are handed on, and on failure asked about again, together


def scan_on_ray(
    sources: Iterable[str],
    queries: Sequence[str] = (),
    *,
    model: str,
    address: str | None = None,
    actors: int | None = None,
    loading: Mapping[str, Any] | None = None,
    task: str = "detect",
    threshold: float = 0.0,
    fps: float | None = None,
    every: int = 1,
    done: set[bytes] | None = None,
    **settings: Any,
) -> Generator[Record, None, None]:
    """`scan`, with sources, model and this project where every machine of the cluster finds them.

    Args:
        model: folder or hub id. loading: how each actor loads it, as `hub.loading.load` takes it.
        address: of a running cluster, as `ray.init` takes it; None for this machine alone.
        actors: engines; by default one for each GPU, or for each machine where there are none.
        The others are those of `scan`.

    Raises:
        ImportError: Ray is not installed.
        RuntimeError: an engine cannot go on, as after a device's error, or Ray cannot.
    """
    import ray
    import ray.data

    if not ray.is_initialized():
        ray.init(address=address or None, log_to_driver=False)
    done = set() if done is None else done
    gpus = int(ray.cluster_resources().get("GPU", 0))
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 1  # a row goes on as soon as it is there, and not with 128 MiB of others
    context.enable_progress_bars = False
    listed, here = iter(sources), os.getcwd()
    lists = [{"sources": some} for some in iter(lambda: list(islice(listed, 16 * CHUNK)), [])]
    asked = {"queries": tuple(queries), "task": task, "threshold": threshold, "settings": settings}
    answers = (
        ray.data.from_items(lists)
        # another share of a CPU than the actors, as Ray would read within them otherwise, a whole list in one
        .map_batches(_read, fn_kwargs={"folder": here, "fps": fps, "every": every}, batch_size=1, num_cpus=0.5)
        .map_batches(
            Engine,
            fn_constructor_kwargs={"folder": here, "model": model, "loading": loading, "done": set(done), **asked},
            batch_size=1,
            num_gpus=1 if gpus else 0,
            compute=ray.data.ActorPoolStrategy(
                size=actors or gpus or len(ray.nodes()),
                # the last pictures of a chunk are answered beside the first ones of the next
                enable_true_multi_threading=True,
                max_concurrent_calls_per_actor=2,
                max_tasks_in_flight_per_actor=4,
            ),
        )
    )
    for row in answers.iter_rows():
        for record in pickle.loads(row["records"]):
            if record.key not in done:
                done.add(record.key)
                yield record


def _read(batch: Any, *, folder: str, fps: float | None, every: int) -> Iterator[dict[str, Any]]:
    """Sources → chunks of items, pickled. Frames of videos are decoded here."""
    os.chdir(folder)
    items = read_items(map(str, batch["sources"][0]), fps=fps, every=every)
    while chunk := [_portable(item) for item in islice(items, CHUNK)]:
        yield {"items": [pickle.dumps(chunk)]}


def _portable(item: Item) -> Item:
    return replace(item, image=item.load()) if hasattr(item.image, "to_image") else item


class Engine:
    """An actor: a model, its engine, and threads that prepare pictures for it."""

    def __init__(self, *, folder: str, model: str, loading: Any, done: set[bytes], settings: dict, **asked: Any):
        from hub.loading import load

        os.chdir(folder)
        loaded, processor = load(model, **(loading or {}))
        self.settings, self.done = dict(settings), done
        rows = self.settings.pop("max_batch_rows", None)
        if not self.settings.pop("keep_repetitions", False):
            self.settings["stopping_criteria"] = [loaded.degenerate_answer_criteria()]
        self.interviewer = Interviewer(processor, mode=settings.get("generation_mode", "hybrid"), **asked)
        self.pool = ThreadPoolExecutor(WORKERS, "scan")
        self.manager = loaded.init_continuous_batching(max_batch_rows=rows)
        self.manager.start()

    def __call__(self, batch: Any) -> dict[str, Any]:
        """A chunk of items → its records, both pickled."""
        items = ((item, self.interviewer.questions(item)) for item in pickle.loads(batch["items"][0]))
        work = ((item, kept) for item, each in items if (kept := [one for one in each if one.key not in self.done]))
        records, running = [], []
        for prepared in ahead(self.pool, self.interviewer.prepare, work, depth=2 * WORKERS):
            for one in prepared:
                if one.row is None:
                    records.append(self.interviewer.record(one))
                    continue
                try:
                    running.append((one, self.manager.add_request(**one.row, **self.settings)))
                except ValueError as error:  # a row over the limit, say
                    records.append(self.interviewer.record(replace(one, error=str(error))))
        for one, request in running:
            output = self.manager.get_result(request)
            if output is None or not self.manager.is_running():
                raise RuntimeError(f"the engine cannot go on: {getattr(output, 'error', None)}")
            records.append(self.interviewer.record(one, output))
        return {"records": [pickle.dumps(records)]}
