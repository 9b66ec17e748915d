"""The formats that `benchmarks.stft` compares with: each writes the same items and reads them shuffled with two workers.

A peer is a class with the names of the modules it needs, `write(folder, items, batch)` and `batches(folder, count, batch)`,
which gives something to iterate over once per epoch: dicts of tensors `stft` and `number`. Whatever is faster of what
a format offers is used: tensors made in the worker, so that the stock `DataLoader` sends them through shared memory.
"""
import contextlib
import importlib
import importlib.util
import io
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

WORKERS, SHARD = 2, 32 << 20  # processes that read; bytes of a shard where a format has them


def stock(dataset, batch, **more):
    "The DataLoader as everyone uses it"
    return DataLoader(dataset, **{'batch_size': batch, 'shuffle': batch is not None, 'num_workers': WORKERS, 'persistent_workers': True, **more})


class ByNumber(Dataset):
    "A dataset that opens its file in the process that reads it"
    def __init__(self, path, count): self.path, self.count, self.file = str(path), count, None
    def __len__(self): return self.count

    def __getitem__(self, number):
        if self.file is None: self.file = self.open()
        return self.read(number)


# ---------------------------------------------------------------- formats

class HDF5(ByNumber):
    "h5py, one contiguous dataset"
    name, needs = 'h5py', ['h5py']

    @staticmethod
    def write(folder, items, batch):
        import h5py
        with h5py.File(folder / 'items.h5', 'w') as file:
            stft = file.create_dataset('stft', (len(items), *items.shape), 'f2')
            number = file.create_dataset('number', (len(items),), 'f4')
            for k, array in enumerate(items): stft[k], number[k] = array, k

    @classmethod
    def batches(cls, folder, count, batch): return stock(cls(folder / 'items.h5', count), batch)

    def open(self): return importlib.import_module('h5py').File(self.path)
    def read(self, number): return dict(stft=torch.from_numpy(self.file['stft'][number]), number=torch.tensor(self.file['number'][number]))


class PickledLMDB(ByNumber):
    "A dict per key, pickled"
    name, needs = 'LMDB + pickle', ['lmdb']

    @staticmethod
    def write(folder, items, batch):
        import lmdb
        with lmdb.open(str(folder), map_size=4 << 30) as environment, environment.begin(write=True) as transaction:
            for k, array in enumerate(items): transaction.put(str(k).encode(), pickle.dumps(dict(stft=array, number=np.float32(k)), 5))

    @classmethod
    def batches(cls, folder, count, batch): return stock(cls(folder, count), batch)

    def open(self): return importlib.import_module('lmdb').open(self.path, readonly=True, lock=False, readahead=False)

    def read(self, number):
        with self.file.begin(buffers=True) as transaction: item = pickle.loads(transaction.get(str(number).encode()))
        return dict(stft=torch.from_numpy(item['stft']), number=torch.tensor(item['number']))


class BatchFiles(Dataset):
    "A file per batch, as torch.save writes it; only whole batches can be shuffled"
    name, needs = '.pt batches', []

    @staticmethod
    def write(folder, items, batch):
        for first in range(0, len(items), batch):
            some = range(first, first + batch)
            torch.save(dict(stft=torch.from_numpy(np.stack([items[k] for k in some])), number=torch.tensor(some, dtype=torch.float32)), folder / f'{first:06d}.pt')

    def __init__(self, folder): self.files = sorted(map(str, Path(folder).glob('*.pt')))
    def __len__(self): return len(self.files)
    def __getitem__(self, number): return torch.load(self.files[number], weights_only=True)
    @classmethod
    def batches(cls, folder, count, batch): return stock(cls(folder), None, shuffle=True)


class LitData:
    "LitData"
    name, needs = 'LitData', ['litdata']

    @staticmethod
    def write(folder, items, batch):
        from litdata.streaming.writer import BinaryWriter
        writer = BinaryWriter(str(folder), chunk_bytes=SHARD)
        for k, array in enumerate(items): writer[k] = dict(stft=torch.from_numpy(array.copy()), number=torch.tensor(float(k)))
        writer.done()
        writer.merge()

    @staticmethod
    def batches(folder, count, batch):
        from litdata import StreamingDataLoader, StreamingDataset
        return StreamingDataLoader(StreamingDataset(str(folder), shuffle=True), batch_size=batch, num_workers=WORKERS, persistent_workers=True)


class MDS:
    "MosaicML streaming"
    name, needs = 'MosaicML MDS', ['streaming']

    @staticmethod
    def write(folder, items, batch):
        from streaming import MDSWriter
        columns = dict(stft=f'ndarray:float16:{",".join(map(str, items.shape))}', number='float32')
        with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD) as writer:
            for k, array in enumerate(items): writer.write(dict(stft=array, number=np.float32(k)))

    @staticmethod
    def batches(folder, count, batch):
        from streaming import StreamingDataset
        return stock(StreamingDataset(local=str(folder), shuffle=True, batch_size=batch), batch, shuffle=False)


class WebDataset:
    "WebDataset: tar files, read one after the other through a shuffle buffer"
    name, needs = 'WebDataset', ['webdataset']

    @staticmethod
    def write(folder, items, batch):
        import webdataset
        with webdataset.ShardWriter(str(folder / '%04d.tar'), maxsize=SHARD, verbose=0) as writer:
            for k, array in enumerate(items): writer.write({'__key__': f'{k:06d}', 'npy': array, 'cls': k})

    @staticmethod
    def batches(folder, count, batch):
        import webdataset
        tars = sorted(map(str, folder.glob('*.tar')))
        dataset = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(4 * batch).decode().map(WebDataset.item).batched(batch, collation_fn=default_collate)
        return webdataset.WebLoader(dataset, batch_size=None, num_workers=WORKERS, persistent_workers=True)

    @staticmethod
    def item(found): return dict(stft=torch.from_numpy(found['npy']), number=torch.tensor(float(found['cls'])))


class Wids(WebDataset):
    "The random access to tar files that webdataset had until 0.2.111"
    name, needs = 'WebDataset wids', ['webdataset', 'wids']

    @staticmethod
    def batches(folder, count, batch):
        import wids
        tars = [dict(url=str(tar), nsamples=wids.wids.compute_num_samples(str(tar))) for tar in sorted(folder.glob('*.tar'))]
        with contextlib.redirect_stderr(io.StringIO()): dataset = wids.ShardListDataset(tars, localname=str, lru_size=len(tars), keep=True, transformations=[Wids.read])
        return stock(dataset, batch)

    @staticmethod
    def read(found): return dict(stft=torch.from_numpy(np.load(found['.npy'])), number=torch.tensor(float(found['.cls'].read())))


class HuggingFace:
    "HF datasets: Arrow, its torch format"
    name, needs = 'HF datasets', ['datasets']

    @staticmethod
    def write(folder, items, batch):
        import datasets
        columns = datasets.Features(dict(stft=datasets.Sequence(datasets.Value('float16'), length=int(np.prod(items.shape))), number=datasets.Value('float32')))
        with datasets.arrow_writer.ArrowWriter(features=columns, path=str(folder / 'items.arrow'), writer_batch_size=batch) as writer:
            for k, array in enumerate(items): writer.write(dict(stft=array.reshape(-1), number=k))
            writer.finalize()

    @staticmethod
    def batches(folder, count, batch):
        import datasets
        dataset = datasets.Dataset.from_file(str(folder / 'items.arrow'))
        return stock(dataset.with_format('torch', columns=['stft'], output_all_columns=True, dtype=torch.float16), batch)  # otherwise it makes float32


PEERS = {peer.name: peer for peer in (LitData, MDS, WebDataset, Wids, HuggingFace, HDF5, PickledLMDB, BatchFiles)}


# ---------------------------------------------------------------- what is there

def import_peer(name):
    "Import what a peer needs; ImportError where it is not there"
    if name == MDS.name: _spare_mosaic()
    for module in PEERS[name].needs: importlib.import_module(module)


def _spare_mosaic():
    "Spare `streaming` the packages for text and images, which it imports without need: of transformers two names, torchvision"
    for name in ('multimodal', 'text', 'vision'): sys.modules.setdefault(f'streaming.{name}', types.ModuleType(f'streaming.{name}'))
    if 'transformers' in sys.modules or importlib.util.find_spec('transformers'): return
    for module, kind in (('feature_extraction_utils', 'BatchFeature'), ('tokenization_utils_base', 'BatchEncoding')):
        stand_in = types.ModuleType(f'transformers.{module}')
        setattr(stand_in, kind, type(kind, (dict,), {}))
        sys.modules.setdefault('transformers', types.ModuleType('transformers'))
        sys.modules.setdefault(f'transformers.{module}', stand_in)
