"""Shards become one model: cut into any ranges, merged in groups of any size, killed at any step, it is the model of a single process."""
import functools
import itertools
import os
import random
import signal
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_groove_model import random_corpus, saved, shard_model, small

from datatools.core import FormatError
from datatools.groove import shards, train
from datatools.groove.events import GrooveConfig
from datatools.groove.files import FileList
from datatools.groove.model import GrooveModel, empty_totals, shard_coverage, write_model
from datatools.groove.train import Run, merge_files, train_model
from datatools.jobs import InlineEngine
from datatools.testing import write_drum_corpus


def rows_of(*models): return sum(len(counts) for model in models for _, counts in GrooveModel.load(model).tables.values())


def merged(folder, number, cuts, fan_in):
    "Bytes of the model that the steps of a job come to"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, 'FAN_IN', fan_in)
        steps = [*shards.merge_steps(folder, number, cuts, folder/'model')]
    for step in steps:
        for function, arguments in random.Random(0).sample(step, len(step)): function(*arguments)
    return (folder/'model').read_bytes()


@settings(max_examples=12, deadline=None)
@given(small, st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 12), st.integers(2, 5), st.booleans())
def test_any_ranges_in_any_groups_give_the_same_bytes(tmp_path_factory, config, seed, number, ranges, fan_in, with_style):
    folder, rng = tmp_path_factory.mktemp('ranges'), random.Random(seed)
    performances = random_corpus(seed, config, 12)
    values = [rng.choice(['rock', 'funk', 'funk/groove', None]) if with_style else None for _ in performances]
    models = [folder/f'level-0-{index}.model' for index in range(number)]
    for index, model in enumerate(models): shard_model(config, performances, values, index, number).save(model)
    rows = rows_of(*models)
    cuts = shards.choose_cuts(models, rows, ranges)
    assert cuts == sorted(cuts) and len(cuts) < ranges
    if rows >= 100 * number: assert len(cuts) == ranges - 1  # a key occurs once a model and table, so no range can be empty
    assert merged(folder, number, cuts, fan_in) == saved(shard_model(config, performances, values, 0, 1), folder/'whole')


def write_skewed(folder, number, rows=20_000):
    "Models whose keys crowd at one end, with one table much longer than the others"
    rng, sizes = np.random.default_rng(number), dict(feel=rows // 20, ngram=rows, position=rows // 5)
    for index in range(number):
        keys = {name: np.unique((2.0**60 * rng.random(size) ** 8).astype(np.uint64)) for name, size in sizes.items()}
        write_model(folder/f'level-0-{index}.model', GrooveConfig(), shard_coverage('list', index, number), empty_totals(),
            [(name, [(each[:, None], rng.integers(1, 9, len(each)).astype(np.uint32))]) for name, each in keys.items()])
    return [folder/f'level-0-{index}.model' for index in range(number)]


def test_ranges_have_about_as_many_rows(tmp_path):
    models = write_skewed(tmp_path, 7)
    rows = rows_of(*models)
    cuts = shards.choose_cuts(models, rows, 10)
    lengths = []
    for place, span in enumerate(zip([None, *cuts], [*cuts, None])):
        shards.merge_range(models, tmp_path/'range', span, (place, 10))
        lengths.append(rows_of(tmp_path/'range'))
    merge_files(models, tmp_path/'whole')
    assert sum(lengths) == rows_of(tmp_path/'whole') > 50_000  # no key in two ranges, none lost
    assert max(lengths) < 1.1 * min(lengths)


@pytest.mark.parametrize('cuts', [0, 3])
def test_a_damaged_shard_is_noticed_by_one_of_the_tasks(tmp_path, cuts):
    models = write_skewed(tmp_path, 5, 500)
    cuts = shards.choose_cuts(models, rows_of(*models), cuts + 1)
    for model in models:
        sound = model.read_bytes()
        model.write_bytes(sound[:-2000] + bytes([sound[-2000] ^ 1]) + sound[-1999:])
        with pytest.raises(FormatError, match=f'{model.name} is damaged'): merged(tmp_path, 5, cuts, 64)
        model.write_bytes(sound)
    assert merged(tmp_path, 5, cuts, 64)


def test_memory_does_not_grow_with_the_number_of_models(tmp_path, monkeypatch):
    models = write_skewed(tmp_path, 30, 50_000)
    monkeypatch.setattr(train, 'HELD_ROWS', 1)  # so 4,096 rows of each
    shards.merge_range(models[:2], tmp_path/'first', (None, None), (0, 1))  # what is compiled at the first use is compiled now
    tracemalloc.start()
    try: shards.merge_range(models, tmp_path/'whole', (None, None), (0, 1))
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert sum(model.stat().st_size for model in models) > 20e6 and peak < 12e6


# A job that dies

@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus')
    paths = write_drum_corpus(folder, 10)
    paths[3].write_bytes(b'not MIDI' * 200)
    paths[8].write_bytes(paths[8].read_bytes()[:-30])
    return folder


def count(corpus, output, engine='local', **how):
    train_model(FileList.from_directory(corpus), output, GrooveConfig(order=3, aux_key='style'), Run(show_progress=False, log_every=0, **how), engine, **({} if engine == 'local' else dict(shards=5)))
    return [path.read_bytes() for path in (output, Path(f'{output}.skipped.jsonl'))]


def in_a_child(function, *arguments, kill_at):
    "Call in a forked process that kills itself at one of the steps that last: opening to write, renaming, deleting, making a folder. The number of steps, or None if it was killed"
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        steps = itertools.count(1)
        def hook(event, arguments):
            writes = event == 'open' and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if (writes or event in ('os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.truncate')) and next(steps) == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        try:
            function(*arguments)
            os.write(writer, str(next(steps)).encode())
        finally: os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as said: return int(said.read() or 0) or None


def test_killed_at_any_step(corpus, monkeypatch):
    monkeypatch.setattr(shards, 'RANGE_ROWS', 200)
    monkeypatch.setattr(shards, 'FAN_IN', 2)
    with tempfile.TemporaryDirectory(dir='/dev/shm' if os.access('/dev/shm', os.W_OK) else None) as folder:
        there = Path(folder)
        expected = count(corpus, there/'alone')
        monkeypatch.setattr(shards, 'MOST_RANGES', 4)
        assert count(corpus, there/'apart', InlineEngine()) == expected
        steps = in_a_child(functools.partial(count, corpus, there/'all', InlineEngine()), kill_at=None)
        assert steps > 100
        for kill_at in range(1, steps, 29):
            output = there/f'{kill_at}/model'
            job = functools.partial(count, corpus, output, InlineEngine(), resume=True)
            assert in_a_child(job, kill_at=kill_at) is None
            in_a_child(job, kill_at=5 + kill_at % 40)  # and again
            assert job() == expected
            assert [path.name for path in sorted(output.parent.iterdir())] == ['model', 'model.checkpoints', 'model.skipped.jsonl']
