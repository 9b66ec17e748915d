"Shards: the same bytes whatever happens on the way, one coordinator at a time, and a dataset that names what is missing"
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from datatools.core import FormatError, LockedError, MismatchError, UsageError, file_lock, hash_file
from datatools.stft import ShardedSTFTDataset
from datatools.stft.precompute import PrecomputeOptions, list_files, precompute
from datatools.stft.shards import divide, precompute_shards, shard_name, verify_shards
from datatools.stft.transform import STFTConfig

RATE = 8_000
CONFIG = STFTConfig(RATE, (256,), 64, segment_seconds=.5)
INLINE = PrecomputeOptions(workers=0)


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus')
    for number in range(14): soundfile.write(folder/f'{number:02}.wav', np.random.default_rng(number).normal(0, .1, RATE * (1 + number % 4)), RATE)
    (folder/'07 broken.wav').write_bytes(b'RIFF and nothing')
    return folder


def hashes(output): return {str(path.relative_to(output)): hash_file(path) for path in sorted(output.glob('shard-*/*/data.mdb'))}


@pytest.fixture(scope='module')
def reference(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp('reference')/'shards'
    precompute(corpus, output, CONFIG, .3, options=INLINE, shards=4)
    return output


def tidy(output, shards=4):
    assert sorted(os.listdir(output)) == ['.lock', 'files.json', 'manifest.json', *map(shard_name, range(shards))]


@pytest.mark.parametrize('sizes', [[1], [5, 1, 1, 1, 90, 2], [0, 0, 0], [3] * 40])
@pytest.mark.parametrize('shards', [1, 3, 7])
def test_every_file_is_in_one_shard_in_order_and_sizes_are_balanced(sizes, shards):
    parts = divide({f'{number:02}': dict(bytes=size) for number, size in enumerate(sizes)}, shards)
    assert len(parts) == shards and sum(parts, []) == [f'{number:02}' for number in range(len(sizes))]
    held = [sum(sizes[int(name)] for name in part) for part in parts]
    assert max(held) <= sum(sizes) / shards + max(sizes)


def test_more_shards_than_files(corpus, tmp_path):
    made = precompute([corpus/'00.wav', corpus/'01.wav'], tmp_path/'out', CONFIG, 0, options=INLINE, shards=5)
    tidy(tmp_path/'out', 5)
    assert made['train']['files'] == 2 and len(ShardedSTFTDataset(tmp_path/'out')) == made['train']['items'] == 6 and len(ShardedSTFTDataset(tmp_path/'out', 'val')) == 0
    assert verify_shards(tmp_path/'out') == []


RUN = '''
import sys
from datatools.stft.precompute import PrecomputeOptions, precompute
from datatools.stft.transform import STFTConfig
if __name__ == '__main__': precompute(sys.argv[1], sys.argv[2], STFTConfig(8_000, (256,), 64, segment_seconds=.5), .3, options=PrecomputeOptions(workers=0), shards=4)
'''


def test_killed_and_resumed_the_bytes_are_the_same(corpus, reference, tmp_path):
    (tmp_path/'run.py').write_text(RUN)
    job = subprocess.Popen([sys.executable, tmp_path/'run.py', corpus, tmp_path/'out'])
    limit = time.monotonic() + 60
    while not (tmp_path/'out'/shard_name(0)).exists() and job.poll() is None and time.monotonic() < limit: time.sleep(.01)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL and len(hashes(tmp_path/'out')) < 8
    with pytest.raises(FormatError, match='of 4 shards are there'): ShardedSTFTDataset(tmp_path/'out')
    precompute(corpus, tmp_path/'out', CONFIG, .3, options=INLINE, shards=4, resume=True)
    tidy(tmp_path/'out')
    assert hashes(tmp_path/'out') == hashes(reference) and len(hashes(reference)) == 8 and verify_shards(tmp_path/'out') == []


def test_one_coordinator_at_a_time(corpus, reference):
    with file_lock(reference/'.lock'), pytest.raises(LockedError): precompute(corpus, reference, CONFIG, .3, options=INLINE, shards=4, resume=True)


def test_what_is_in_the_way_is_named(corpus, reference, tmp_path):
    with pytest.raises(MismatchError, match='keep_audio'): precompute(corpus, reference, CONFIG, .3, options=INLINE, shards=4, resume=True, keep_audio=True)
    for shards in (0, 1.5, True, 10**6):
        with pytest.raises(UsageError, match='shards'): precompute(corpus, tmp_path/'out', CONFIG, options=INLINE, shards=shards)
    precompute([corpus/'00.wav'], tmp_path/'plain', CONFIG, 0, options=INLINE)
    with pytest.raises(UsageError, match='one pair of stores'): precompute([corpus/'00.wav'], tmp_path/'plain', CONFIG, 0, options=INLINE, shards=2, resume=True)


def test_a_file_that_changes_under_a_finished_shard(corpus, reference, tmp_path):
    shutil.copytree(corpus, tmp_path/'in')
    precompute(tmp_path/'in', tmp_path/'out', CONFIG, .3, options=INLINE, shards=4)
    sound, rate = soundfile.read(tmp_path/'in/03.wav')
    os.utime(tmp_path/'in/02.wav')  # another time alone is no other file
    soundfile.write(tmp_path/'in/03.wav', sound[::-1], rate)
    with pytest.raises(MismatchError, match='03.wav'): precompute(tmp_path/'in', tmp_path/'out', CONFIG, .3, options=INLINE, shards=4, resume=True)


def test_refused_files_are_tried_again(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path/'in')
    made = precompute(tmp_path/'in', tmp_path/'out', CONFIG, .3, options=INLINE, shards=4, skip=['02.wav'])
    assert {*made['train']['reasons'], *made['val']['reasons']} == {'02.wav', '07 broken.wav'}
    again = precompute(tmp_path/'in', tmp_path/'out', CONFIG, .3, options=INLINE, shards=4, resume=True, retry_refused=True)
    assert {*again['train']['reasons'], *again['val']['reasons']} == {'07 broken.wav'} and 0 < again['items_now']
    tidy(tmp_path/'out')


def test_written_on_a_disk_of_the_worker_first(corpus, reference, tmp_path):
    (tmp_path/'scratch').mkdir()
    precompute_shards(list_files(corpus, .3), tmp_path/'out', 4, CONFIG, options=INLINE, scratch=str(tmp_path/'scratch'))
    tidy(tmp_path/'out')
    assert hashes(tmp_path/'out') == hashes(reference) and not [*(tmp_path/'scratch').iterdir()]
