"Stores at a URL: they appear when they are finished, go on wherever the job is resumed, and finished shards are not fetched for that"
import json
import os
import subprocess
import sys

import fsspec
import numpy as np
import pytest
import soundfile

from datatools import remote
from datatools.core import DatatoolsError, FormatError, LockedError, Manifest, MismatchError, UsageError
from datatools.remote import claimed, list_files
from datatools.stft import PrecomputedSTFTDataset, ShardedSTFTDataset, shards
from datatools.stft.precompute import FILES, PrecomputeOptions, precompute
from datatools.stft.shards import shard_name, verify_shards
from datatools.stft.transform import STFTConfig

RATE = 8_000
CONFIG = STFTConfig(RATE, (256,), 64, segment_seconds=.5)
OTHER = STFTConfig(RATE, (256,), 32, segment_seconds=.5)
INLINE = PrecomputeOptions(workers=0)
STORES = [name for name in FILES if name.endswith('.mdb')]


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    "Move to another machine: one that has no copies; the first one is `tmp_path/'0'`"
    def move(name): monkeypatch.setenv('DATATOOLS_STAGE', str(tmp_path/name))
    move('0')
    yield move
    store = fsspec.filesystem('memory')
    if store.exists('/out'): store.rm('/out', recursive=True)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path/'corpus'
    folder.mkdir()
    for number in range(10): soundfile.write(folder/f'{number:02}.wav', np.random.default_rng(number).normal(0, .1, RATE * (1 + number % 3)), RATE)
    (folder/'07 broken.wav').write_bytes(b'RIFF and nothing')
    return folder


def make(corpus, output, resume=False, config=CONFIG, **more): return precompute(corpus, output, config, .3, options=INLINE, resume=resume, **more)


def stores(output):
    "Content of the stores below a folder or a URL"
    if remote.is_url(str(output)): return {name: remote.read_at(each.url) for name, each in list_files(output).items() if name.endswith('.mdb')}
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob('data.mdb')}


def breaks(monkeypatch, part):
    "The line breaks when a file is sent whose URL has this part"
    send = remote._send
    def sent(path, url, *more):
        if part in url: raise DatatoolsError('the line broke')
        return send(path, url, *more)
    monkeypatch.setattr(remote, '_send', sent)


def test_a_pair_of_stores_at_a_url(corpus, tmp_path, machine, monkeypatch):
    summary = make(corpus, tmp_path/'here')
    with monkeypatch.context() as patch:
        breaks(patch, 'val.lmdb')
        with pytest.raises(DatatoolsError, match='the line broke'): make(corpus, 'memory://out')
    assert [*list_files('memory://out')] == STORES[:1]
    assert make(corpus, 'memory://out', resume=True)['items_now'] == 0  # it was made, and is sent now
    assert [*list_files('memory://out')] == sorted(FILES) and stores('memory://out') == stores(tmp_path/'here')
    machine('1')
    with pytest.raises(UsageError, match='a place where nothing is'): make(corpus, 'memory://out')
    with pytest.raises(MismatchError, match='hop_length'): make(corpus, 'memory://out', resume=True, config=OTHER)
    again = make(corpus, 'memory://out', resume=True)
    assert again['items_now'] == 0 and {side: again[side] for side in ('train', 'val')} == {side: summary[side] for side in ('train', 'val')}
    with pytest.raises(UsageError, match='one pair of stores'): make(corpus, 'memory://out', resume=True, shards=2)
    with PrecomputedSTFTDataset('memory://out/train.lmdb') as there: assert len(there) == summary['train']['items']


def test_stores_that_were_sent_and_taken_away_are_made_again(corpus):
    made = make(corpus, 'memory://out')
    fsspec.filesystem('memory').rm('/out', recursive=True)
    assert make(corpus, 'memory://out')['items_now'] == made['items_now'] > 0 and [*list_files('memory://out')] == sorted(FILES)


@pytest.fixture
def half(corpus, monkeypatch):
    "A job of four shards at a URL that was stopped when two of them were there"
    whole = shards.make_shard
    def stops(listing, job, final, *more):
        if shard_name(2) in final: raise KeyboardInterrupt
        return whole(listing, job, final, *more)
    with monkeypatch.context() as patch:
        patch.setattr(shards, 'make_shard', stops)
        with pytest.raises(KeyboardInterrupt): make(corpus, 'memory://out', shards=4)


def test_shards_at_a_url(corpus, tmp_path, half, machine, monkeypatch):
    summary = make(corpus, tmp_path/'here', shards=4)
    assert {name.split('/')[0] for name in list_files('memory://out')} == {shard_name(0), shard_name(1)}
    with pytest.raises(FormatError, match='at work, or was interrupted'): ShardedSTFTDataset('memory://out')
    machine('1')
    with pytest.raises(UsageError, match='a place where nothing is'): make(corpus, 'memory://out', shards=4)
    with pytest.raises(MismatchError, match='shard-0000 was made by a job with another'): make(corpus, 'memory://out', resume=True, config=OTHER, shards=4)
    fetched, fetch = [], remote._fetch
    monkeypatch.setattr(remote, '_fetch', lambda each, target: (fetched.append(each.url), fetch(each, target)))
    made = make(corpus, 'memory://out', resume=True, shards=4)
    assert not fetched and 0 < made['items_now'] < summary['items_now'] and {side: made[side] for side in ('train', 'val')} == {side: summary[side] for side in ('train', 'val')}
    assert stores('memory://out') == stores(tmp_path/'here') and len(stores(tmp_path/'here')) == 8
    machine('2')
    assert make(corpus, 'memory://out', resume=True, shards=4)['items_now'] == 0 and not [url for url in fetched if 'shard-' in url]
    here = ShardedSTFTDataset(tmp_path/'here')
    with ShardedSTFTDataset('memory://out') as there:
        assert len(there) == len(here) > 0 and all(there.metadata(index) == here.metadata(index) for index in range(len(here)))
        assert all((there[index][name] == here[index][name]).all() for index in range(len(here)) for name in here.fields)
    assert sum('/train.lmdb/' in url for url in fetched) == 4 and not any('/val.lmdb/' in url for url in fetched)
    assert verify_shards('memory://out') == []


def test_files_that_change_under_shards_at_a_url(corpus, half, machine):
    make(corpus, 'memory://out', resume=True, shards=4)
    machine('1')
    os.utime(corpus/'00.wav')  # another time alone is no other file
    make(corpus, 'memory://out', resume=True, shards=4)
    sound, rate = soundfile.read(corpus/'01.wav')
    soundfile.write(corpus/'01.wav', sound[::-1], rate)
    with pytest.raises(MismatchError, match='01.wav: its items are in memory://out/shard-'): make(corpus, 'memory://out', resume=True, shards=4)


def test_refused_files_of_shards_at_a_url_are_tried_again(corpus, tmp_path, monkeypatch):
    made = make(corpus, 'memory://out', shards=4, skip=['02.wav'])
    assert {*made['train']['reasons'], *made['val']['reasons']} == {'02.wav', '07 broken.wav'}
    with monkeypatch.context() as patch:
        breaks(patch, 'shard-0000/train')
        with pytest.raises(DatatoolsError, match='the line broke'): make(corpus, 'memory://out', resume=True, shards=4, retry_refused=True)
    assert Manifest.name not in list_files('memory://out')
    again = make(corpus, 'memory://out', resume=True, shards=4)
    assert {*again['train']['reasons'], *again['val']['reasons']} == {'07 broken.wav'}
    make(corpus, tmp_path/'here', shards=4)
    assert stores('memory://out') == stores(tmp_path/'here')


@pytest.mark.parametrize('count', [None, 2])
def test_one_program_writes_to_one_url(corpus, count):
    with claimed('memory://out'), pytest.raises(LockedError, match=f'process {os.getpid()}'): make(corpus, 'memory://out', shards=count)


def test_the_command_takes_a_url(corpus, tmp_path):
    "Worker processes send their shards themselves"
    done = subprocess.run([sys.executable, '-m', 'datatools.stft', 'precompute', corpus, '-o', f'file://{tmp_path}/out', '--sample-rate', str(RATE), '--n-fft', '256', '--hop', '64',
                           '--segment-seconds', '.5', '--val-fraction', '.3', '--json', '--shards', '2', '--workers', '2'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = make(corpus, tmp_path/'here', shards=2)
    assert json.loads(done.stdout)['train'] == made['train'] and stores(tmp_path/'out') == stores(tmp_path/'here')
    assert not [path for path in (tmp_path/'out').rglob('*') if path.name.startswith('.') or path.name.endswith('.lock')]
    for words, said in {('stft', 'info'): 'items', ('stft', 'verify'): 'problems                         0', ('info',): f"ShardedSTFTDataset('file://{tmp_path}/out'"}.items():
        done = subprocess.run([sys.executable, '-c', 'from datatools.cli import main; main()', *words, f'file://{tmp_path}/out'], capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
