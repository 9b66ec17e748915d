"""What core promises across process boundaries, and its properties over arbitrary input."""
import json
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings, strategies as st

from datatools.core import (LockedError, Manifest, MemoryLimitError, MismatchError, UsageError, atomic_write, canonical_json,
                            clean_temporaries, config_hash, differences, file_lock, read_json, rng_for, seed_for, write_json)

atoms = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
paths = st.lists(atoms | st.lists(atoms, max_size=3).map(tuple), max_size=4)
json_values = st.recursive(st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                           lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12)


def typed(value):
    "A value with its type, so that 1, True and 1.0 differ."
    return (type(value).__name__, tuple(map(typed, value)) if isinstance(value, tuple) else repr(value))


@settings(deadline=None)
@given(st.integers(), paths, paths)
def test_seeds_differ_where_addresses_differ(seed, one, two):
    assert 0 <= seed_for(seed, *one) < 2**63
    assert (seed_for(seed, *one) == seed_for(seed, *two)) == (list(map(typed, one)) == list(map(typed, two)))


@settings(deadline=None)
@given(st.integers(), st.integers(), paths)
def test_root_seed_matters(one, two, path):
    assert (seed_for(one, *path) == seed_for(two, *path)) == (one == two)


def test_seeds_are_the_same_in_every_process(python):
    program = 'from datatools.core import seed_for, rng_for; print(seed_for(7, "é", 1.5, (2, None)), rng_for(7, "x").integers(2**62))'
    runs = {python('-c', program, env={**os.environ, 'PYTHONHASHSEED': str(i)}).stdout for i in range(2)}
    assert runs == {f'{seed_for(7, "é", 1.5, (2, None))} {rng_for(7, "x").integers(2**62)}\n'}


def test_core_imports_fast(python):
    done = python('-c', 'import sys, datatools.core; print(*{"torch", "numba", "librosa", "matplotlib", "IPython"} & set(sys.modules))')
    assert done.stdout.strip() == '', done.stderr


@settings(max_examples=30, deadline=None)
@given(old=st.binary(max_size=100), new=st.binary(max_size=100), fails=st.booleans())
def test_a_file_is_old_or_new(tmp_path_factory, old, new, fails):
    path = tmp_path_factory.mktemp('atomic')/'file'
    with atomic_write(path) as file: file.write(old)
    try:
        with atomic_write(path) as file:
            file.write(new)
            if fails: raise KeyError('stop')
    except KeyError: assert fails
    assert path.read_bytes() == (old if fails else new)
    assert os.listdir(path.parent) == ['file']


def test_readers_never_see_half_a_file(tmp_path):
    path, stop, seen = tmp_path/'file', threading.Event(), set()
    with atomic_write(path) as file: file.write(b'0' * 100_000)

    def read():
        while not stop.is_set(): seen.add(bytes(set(data := path.read_bytes())) + str(len(data)).encode())
    reader = threading.Thread(target=read)
    reader.start()
    for i in range(1, 50):
        with atomic_write(path) as file:
            for _ in range(10): file.write(str(i % 10).encode() * 10_000)
    stop.set()
    reader.join()
    assert all(content[1:] == b'100000' for content in seen)


def test_full_disk_keeps_the_previous_file(tmp_path, python):
    program = f'''
import resource
from datatools.core import write_json
write_json({str(tmp_path/"facts.json")!r}, [1, 2, 3])
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try: write_json({str(tmp_path/"facts.json")!r}, list(range(100_000)))
except OSError as error: print(type(error).__name__, error.errno)
'''
    done = python('-c', program)
    assert done.stdout == 'OSError 27\n', done.stderr
    assert read_json(tmp_path/'facts.json') == [1, 2, 3]
    assert os.listdir(tmp_path) == ['facts.json']


def test_kill_anywhere_leaves_a_whole_file(tmp_path):
    path = tmp_path/'file.json'
    write_json(path, [0] * 2000)
    program = f'''
from datatools.core import write_json
print('begun', flush=True)
for i in range(1, 10**9): write_json({str(path)!r}, [i] * 2000)
'''
    rng = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait()
        process.stdout.close()
        values = read_json(path)
        assert len(values) == 2000 and len(set(values)) == 1
    clean_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ['file.json']


def test_temporaries_of_the_living_stay(tmp_path):
    with atomic_write(tmp_path/'file') as file:
        assert clean_temporaries(tmp_path) == []
        file.write(b'x')
    (tmp_path/'.mine.tmp').touch()
    (tmp_path/'.mine.1-2.tmp').touch()
    assert clean_temporaries(tmp_path) == []


def test_names_modes_and_links(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path/('ü' * 120)) as file: file.write(b'x')  # 240 bytes
    finally: os.umask(before)
    assert stat.S_IMODE((tmp_path/('ü' * 120)).stat().st_mode) == 0o640
    (tmp_path/'link').symlink_to('target')
    with atomic_write(tmp_path/'link', 'w') as file: file.write('x')
    assert (tmp_path/'link').is_symlink() and (tmp_path/'target').read_text() == 'x'
    with pytest.raises(UsageError, match='a regular file'):
        with atomic_write(tmp_path): pass


@settings(deadline=None)
@given(json_values)
def test_json_round_trip(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp()/'round.json'
    write_json(path, value)
    assert read_json(path) == value and path.read_bytes().endswith(b'\n')
    assert json.loads(canonical_json(value)) == value


@settings(deadline=None)
@given(st.dictionaries(st.text(), json_values, min_size=2), st.randoms())
def test_order_of_keys_does_not_matter(config, rng):
    keys = list(config)
    rng.shuffle(keys)
    assert config_hash({k: config[k] for k in keys}) == config_hash(config)
    assert differences(config, {k: config[k] for k in keys}) == []


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(max_size=5), json_values, max_size=3), st.dictionaries(st.text(max_size=5), json_values, max_size=3))
def test_a_manifest_accepts_exactly_its_config(tmp_path_factory, config, other):
    directory = tmp_path_factory.mktemp('job')
    Manifest.create(directory, 'toy', 1, config)
    job = Manifest.open(directory, 'toy', 1)
    job.check(config)
    if config_hash(config) != config_hash(other):
        with pytest.raises(MismatchError): job.check(other)


def test_a_lock_ends_with_its_process(tmp_path):
    lock = tmp_path/'lock'
    program = f'''
import time
from datatools.core import file_lock
with file_lock({str(lock)!r}):
    print('held', flush=True)
    time.sleep(60)
'''
    holder = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(LockedError, match=f'process {holder.pid} on '):
        with file_lock(lock): pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with file_lock(lock): pass


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(MemoryLimitError('too much', dict(rss_bytes=1))))
    assert str(error) == 'too much' and error.report == dict(rss_bytes=1)
