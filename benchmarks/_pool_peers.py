"""The peers that `benchmarks.pool` compares with: the same fixed-width records, shuffled, in batches, in one process.

    python -m benchmarks._pool_peers              # what each gives, in which every row must come once; about a minute

A peer is a class with the names of the modules it needs, `write(folder, records)`, and readers `Peer(folder, batch, seed)`
that give an epoch in a new order each time it is asked for: `raw()`, batches of packed records, and `dense()`, batches of
float32 tensors `board` (rows, 3, 13, 13), `policy` (rows, 169) and `value` (rows, 1). A record has 48 bytes and, except
in the list-of-dicts pool, which has no packed form, is stored as these; a batch of them is put together first and then
decoded at once, by the same vectorised NumPy code for every peer. No peer decodes row by row, and none starts processes.
Whatever was faster of what a library offers for single rows is used. What gathers whole batches by index arrays is the peer
`mmap gather`, whichever library hands out the indices: torchdata and Grain stand for their item-wise pipelines.
"""
import gzip
import importlib
import logging
import multiprocessing
import pickle
import random
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler, default_collate

from benchmarks._harness import machine, say
from benchmarks._peers import _spare_mosaic

SIZE, CELLS = 13, 169
RECORD = np.dtype([('blue', 'u1', (22,)), ('red', 'u1', (22,)), ('policy', 'u1'), ('flags', 'u1'), ('ply', 'u1'), ('source', 'u1')])
SHARD = 4 << 20  # bytes of records in a file, where a format has files of a size


def random_records(count, seed=0):
    "Records of random planes: no two alike, not positions of a game"
    chance, records = np.random.default_rng(seed), np.zeros(count, RECORD)
    for name in ('blue', 'red'):
        records[name] = chance.integers(0, 256, (count, 22), np.uint8)
        records[name][:, -1] &= 1
    for name, end in (('policy', CELLS), ('flags', 4), ('ply', 200), ('source', 5)): records[name] = chance.integers(0, end, count)
    records['policy'][chance.random(count) < 0.02] = 255
    return records


def decode(records):
    "Packed records as tensors"
    rows, packed = len(records), records.view(np.uint8).reshape(len(records), 48)
    board, policy = np.empty((rows, 3, CELLS), np.float32), np.zeros((rows, CELLS), np.float32)
    board[:, :2] = np.unpackbits(packed[:, :44].reshape(rows, 2, 22), axis=2, count=CELLS, bitorder='little')
    board[:, 2] = (packed[:, 45] & 1)[:, None]
    there = np.flatnonzero(packed[:, 44] != 255)
    policy[there, packed[there, 44]] = 1
    value = (packed[:, 45:46] >> 1 & 1).astype(np.float32)
    return dict(board=torch.from_numpy(board.reshape(rows, 3, SIZE, SIZE)), policy=torch.from_numpy(policy), value=torch.from_numpy(value))


def encode(batch):
    "Tensors as packed records, without ply and source: the way back, for checking"
    board, policy = batch['board'].numpy().reshape(-1, 3, CELLS), batch['policy'].numpy()
    if not set(np.unique(board)) <= {0, 1}: raise RuntimeError('a board has other values than 0 and 1')
    records = np.zeros(len(board), RECORD)
    records['blue'], records['red'] = (np.packbits(board[:, k] > 0, axis=1, bitorder='little') for k in (0, 1))
    records['policy'] = np.where(policy.any(axis=1), policy.argmax(axis=1), 255)
    records['flags'] = board[:, 2, 0] + 2 * batch['value'].numpy()[:, 0]
    return records


def gathered(rows): return np.frombuffer(b''.join(rows), RECORD)  # of a list of bytes


def decode_item(record):
    "The bytes of a record as tensors, as one writes it in the `__getitem__` of a data set"
    packed, board, policy = np.frombuffer(record, np.uint8), np.empty((3, CELLS), np.float32), np.zeros(CELLS, np.float32)
    board[:2] = np.unpackbits(packed[:44].reshape(2, 22), axis=1, count=CELLS, bitorder='little')
    board[2] = packed[45] & 1
    if packed[44] != 255: policy[packed[44]] = 1
    value = np.array([packed[45] >> 1 & 1], np.float32)
    return dict(board=torch.from_numpy(board.reshape(3, SIZE, SIZE)), policy=torch.from_numpy(policy), value=torch.from_numpy(value))


def stacked_items(rows): return default_collate([decode_item(row) for row in rows])


class Reader:
    "What is common: a folder, and another order in each epoch"
    needs = []

    def __init__(self, folder, batch, seed=0): self.folder, self.batch, self.seed, self.epoch = Path(folder), batch, seed, 0

    def raw(self):
        self.epoch += 1
        return iter(self.batches(self.seed + self.epoch))

    def dense(self): return map(decode, self.raw())


class ItemReader(Reader):
    "One that gives items and is told how a list of them becomes a batch: `dense` decodes whole batches at once, `items` item by item"
    collate = staticmethod(gathered)

    def items(self):
        self.collate = stacked_items
        try: yield from self.raw()
        finally: self.collate = gathered


# ---------------------------------------------------------------- peers

class ListOfDicts(Reader):
    "Dicts of arrays in a list, refilled from pickles when three quarters are left, and shuffled then; `raw` gives lists of dicts"
    name, rows, most = 'list-of-dicts pool', 8192, 100_000  # in a file; records that it can be asked to turn over in a benchmark

    @classmethod
    def write(cls, folder, records):
        for first in range(0, len(records), cls.rows):
            some = records[first:first + cls.rows]
            tensors = {name: each.numpy() for name, each in decode(some).items()}
            examples = [dict(board=board[:2].copy(), policy=policy.copy() if policy.any() else None, value=float(value[0]), player_to_move=int(board[2, 0, 0]),
                metadata=dict(game_id=first, position_in_game=int(ply), source=int(source)))
                for board, policy, value, ply, source in zip(*(tensors[each] for each in ('board', 'policy', 'value')), some['ply'], some['source'])]
            with gzip.open(folder / f'shuffled_{first // cls.rows:04d}.pkl.gz', 'wb', compresslevel=6) as file: pickle.dump(dict(examples=examples), file, 5)

    def __init__(self, folder, batch, seed=0, pool=None):
        super().__init__(folder, batch, seed)
        self.files = sorted(self.folder.glob('*.pkl.gz'))
        self.pool = pool or max(2 * batch, self.rows * len(self.files) // 4)

    def batches(self, seed):
        chance, files, pool = random.Random(seed), self.files.copy(), []
        chance.shuffle(files)
        while files or pool:
            if files and len(pool) < max(self.pool * 3 // 4, self.batch):
                while files and len(pool) < self.pool:
                    with gzip.open(files.pop()) as file: pool += pickle.load(file)['examples']
                chance.shuffle(pool)
            yield [pool.pop() for _ in range(min(self.batch, len(pool)))]

    def dense(self): return map(self.stacked, self.raw())

    def items(self):
        for examples in self.raw(): yield default_collate([self.tensors(each) for each in examples])

    @staticmethod
    def tensors(example):
        "An example as a data set of single ones yields it"
        board = np.concatenate([example['board'], np.full((1, SIZE, SIZE), example['player_to_move'], np.float32)])
        policy = NONE if example['policy'] is None else example['policy']
        return dict(board=torch.from_numpy(board), policy=torch.from_numpy(policy), value=torch.tensor([example['value']], dtype=torch.float32))

    @staticmethod
    def stacked(examples):
        board = np.empty((len(examples), 3, SIZE, SIZE), np.float32)
        np.stack([each['board'] for each in examples], out=board[:, :2])
        board[:, 2] = np.array([each['player_to_move'] for each in examples], np.float32)[:, None, None]
        policy = np.stack([NONE if each['policy'] is None else each['policy'] for each in examples])
        value = np.array([each['value'] for each in examples], np.float32)[:, None]
        return dict(board=torch.from_numpy(board), policy=torch.from_numpy(policy), value=torch.from_numpy(value))


NONE = np.zeros(CELLS, np.float32)


class LitData(ItemReader):
    "An item is a record, as bytes: twice as fast as blocks of 48 tokens"
    name, needs = 'LitData', ['litdata']

    @staticmethod
    def write(folder, records):
        from litdata.streaming.writer import BinaryWriter
        writer = BinaryWriter(str(folder), chunk_bytes=SHARD)
        for k, record in enumerate(records): writer[k] = record.tobytes()
        writer.done()
        writer.merge()

    def __init__(self, folder, batch, seed=0):
        super().__init__(folder, batch, seed)
        from litdata import StreamingDataLoader, StreamingDataset
        dataset = StreamingDataset(str(folder), shuffle=True, seed=seed, drop_last=False)
        self.loader = StreamingDataLoader(dataset, batch_size=batch, num_workers=0, collate_fn=lambda rows: self.collate(rows))

    def batches(self, seed): return self.loader


class MDS(ItemReader):
    "A column of bytes"
    name, needs = 'MosaicML streaming', ['streaming']

    @staticmethod
    def write(folder, records):
        from streaming import MDSWriter
        with MDSWriter(out=str(folder), columns=dict(record='bytes'), size_limit=SHARD) as writer:
            for record in records: writer.write(dict(record=record.tobytes()))

    def __init__(self, folder, batch, seed=0):
        super().__init__(folder, batch, seed)
        from streaming import StreamingDataset
        dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=batch, shuffle_seed=seed)
        self.loader = DataLoader(dataset, batch, collate_fn=lambda rows: self.collate([row['record'] for row in rows]))

    def batches(self, seed): return self.loader


class WebDataset(ItemReader):
    "A file of 48 bytes per record in tar files, read in order through a buffer of twenty batches"
    name, needs = 'WebDataset', ['webdataset']

    @staticmethod
    def write(folder, records):
        import webdataset
        with webdataset.ShardWriter(str(folder / '%05d.tar'), maxcount=SHARD // 48, maxsize=1 << 40, verbose=0) as writer:
            for k, record in enumerate(records): writer.write({'__key__': f'{k:09d}', 'bin': record.tobytes()})

    def batches(self, seed):
        import webdataset
        tars = sorted(map(str, self.folder.glob('*.tar')))
        stream = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=seed).shuffle(20 * self.batch, initial=20 * self.batch, rng=random.Random(seed))
        return stream.map(lambda item: item['bin']).batched(self.batch, collation_fn=lambda rows: self.collate(rows))


class HuggingFace(Reader):
    "Lists of 48 numbers in Arrow, mapped into memory; batches as Arrow tables by shuffled indices"
    name, needs = 'HF datasets', ['datasets']

    @staticmethod
    def write(folder, records):
        import datasets
        columns = datasets.Features(dict(record=datasets.List(datasets.Value('uint8'), length=48)))
        with datasets.arrow_writer.ArrowWriter(features=columns, path=str(folder / 'records.arrow'), writer_batch_size=SHARD // 48) as writer:
            for first in range(0, len(records), SHARD // 48):
                some = records[first:first + SHARD // 48]
                writer.write_batch(dict(record=some.view(np.uint8).reshape(len(some), 48)))
            writer.finalize()

    def __init__(self, folder, batch, seed=0):
        super().__init__(folder, batch, seed)
        import datasets
        self.dataset = datasets.Dataset.from_file(str(self.folder / 'records.arrow')).with_format('arrow')

    def batches(self, seed):
        order = np.random.default_rng(seed).permutation(len(self.dataset))
        for first in range(0, len(order), self.batch):  # at least as fast as self.dataset.shuffle(seed).iter(self.batch)
            table = self.dataset[order[first:first + self.batch]]
            yield table['record'].combine_chunks().flatten().to_numpy().view(RECORD)


class Mapped(Reader):
    "Records as they are in one file, mapped into memory"
    @staticmethod
    def write(folder, records): records.tofile(folder / 'records')

    def __init__(self, folder, batch, seed=0):
        super().__init__(folder, batch, seed)
        self.records = np.memmap(self.folder / 'records', RECORD, 'r')


class Rows:
    "The rows of a file one by one, as bytes"
    def __init__(self, records): self.bytes, self.count = memoryview(records.view(np.uint8)), len(records)
    def __len__(self): return self.count
    def __getitem__(self, k): return self.bytes[48 * k:48 * k + 48]


class TorchData(Mapped, ItemReader):
    "Nodes: sampler, rows of a mapped file, batches, collation"
    name, needs = 'torchdata nodes', ['torchdata.nodes']

    def batches(self, seed):
        from torchdata import nodes
        rows = Rows(self.records)
        sampler = RandomSampler(rows, generator=torch.Generator().manual_seed(seed))
        batches = nodes.Batcher(nodes.MapStyleWrapper(rows, nodes.SamplerWrapper(sampler)), self.batch, drop_last=False)
        return nodes.Loader(nodes.Mapper(batches, self.collate), restart_on_stop_iteration=False)


class Grain(Mapped, ItemReader):
    "Rows of a mapped file, shuffled by index, in batches; without threads, which cost more than they hide here"
    name, needs = 'Grain', ['grain']

    def batches(self, seed):
        import grain
        rows = grain.MapDataset.source(Rows(self.records)).shuffle(seed).batch(self.batch, batch_fn=self.collate)
        return rows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


class MappedGather(Mapped):
    "A permutation of everything, and NumPy gathers a batch of rows at once"
    name = 'mmap gather'

    def batches(self, seed):
        rows, order = self.records.view('V48'), np.random.default_rng(seed).permutation(len(self.records))
        for first in range(0, len(order), self.batch): yield np.asarray(rows.take(order[first:first + self.batch])).view(RECORD)


PEERS = {peer.name: peer for peer in (ListOfDicts, LitData, MDS, WebDataset, HuggingFace, TorchData, Grain, MappedGather)}


# ---------------------------------------------------------------- what is there, and whether it is right

def import_peer(name):
    "Import what a peer needs; ImportError where it is not there"
    logging.getLogger('absl').setLevel(logging.ERROR)  # of Grain, about jax
    if name == MDS.name: _spare_mosaic()
    for module in PEERS[name].needs: importlib.import_module(module)


def check_epoch(reader, records):
    "An epoch of each kind, in which every row must come exactly once; RuntimeError otherwise"
    bare = records.copy()
    bare['ply'] = bare['source'] = 0
    for kind, should in (('raw', records), ('dense', bare), ('items', bare)):
        if not hasattr(reader, kind): continue
        found = []
        for batch in getattr(reader, kind)():
            if isinstance(batch, list): batch = encode(reader.stacked(batch))  # of dicts
            found.append(encode(batch) if isinstance(batch, dict) else batch.copy())
        if any(len(batch) != reader.batch for batch in found[:-1]): raise RuntimeError(f'{reader.name}: batches of another size than {reader.batch}')
        found = np.concatenate(found)
        if len(found) != len(should): raise RuntimeError(f'{reader.name}, {kind}: {len(found):,} rows of {len(should):,}')
        if np.array_equal(found, should): raise RuntimeError(f'{reader.name}, {kind}: not shuffled')
        if kind == 'raw' and isinstance(reader, ListOfDicts): should = bare
        if (np.sort(found.view('S48')) != np.sort(should.view('S48'))).any(): raise RuntimeError(f'{reader.name}, {kind}: not the rows that were written')


def consume(batches):
    "Take all batches; the number of rows"
    return sum(len(batch['board'] if isinstance(batch, dict) else batch) for batch in batches)


def measured(name, count, batch):
    "Rows per processor second, raw, dense and item by item, and bytes on disk per row; or why there is nothing to measure"
    warnings.simplefilter('ignore')  # of peers about arrays that are not writeable
    torch.set_num_threads(1)
    try: import_peer(name)
    except ImportError as error: return str(error)
    records, rates = random_records(count), []
    with tempfile.TemporaryDirectory(prefix='pool-peers-') as folder:
        PEERS[name].write(Path(folder), records)
        disk = sum(each.stat().st_size for each in Path(folder).rglob('*') if each.is_file()) / count
        reader = PEERS[name](folder, batch)
        check_epoch(reader, records)
        for kind in ('raw', 'dense', 'items'):
            begin = time.process_time()
            rates.append(consume(getattr(reader, kind)()) / (time.process_time() - begin) if hasattr(reader, kind) else float('nan'))
    return *rates, disk


def main(count=100 * 1024, batch=1024):
    facts = machine()
    say(f'{facts["cpu"]}, {facts["cores"]} cores, load {facts["load"]}: {count:,} records, batches of {batch:,}')
    print(f'{"rows per processor second":28}{"raw":>12}{"dense":>12}{"items":>12}{"on disk":>17}')
    for name in PEERS:  # each in a process of its own: what one imports or stands in for does not disturb the others
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as process: found = process.submit(measured, name, count, batch).result()
        if isinstance(found, str): print(f'left out: {name}: {found}', flush=True)
        else: print(f'{name:28}{found[0]:12,.0f}{found[1]:12,.0f}{found[2]:12,.0f}{found[3]:10,.1f} B/row', flush=True)


if __name__ == '__main__': main()
