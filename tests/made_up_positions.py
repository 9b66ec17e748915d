"""Data for the tests of training and tuning: a stream of batches without files, and shards of made-up Hex positions."""
import time

import numpy as np
import torch

from datatools.core import MismatchError, rng_for
from datatools.pool.hex import HexCodec
from datatools.pool.shards import ShardWriter


class MadeUpPositions(torch.utils.data.IterableDataset):
    "The best move is the cell below the only stone, and who has the stone wins."
    def __init__(self, batches=12, batch_size=16, board_size=4, seed=0, delay=0.):
        self.batches, self.batch_size, self.board_size, self.seed, self.delay = batches, batch_size, board_size, seed, delay
        self.epoch = self.position = 0

    def __len__(self): return self.batches
    def set_epoch(self, epoch): self.epoch, self.position = epoch, 0
    def state_dict(self): return dict(seed=self.seed, epoch=self.epoch, position=self.position)

    def load_state_dict(self, state):
        if state['seed'] != self.seed: raise MismatchError(f'The state is of seed {state["seed"]}, this data has seed {self.seed}.')
        self.epoch, self.position = state['epoch'], state['position']

    def __iter__(self):
        while self.position < self.batches:
            batch = self.batch(rng_for(self.seed, self.epoch, self.position))
            self.position += 1
            time.sleep(self.delay)
            yield batch

    def batch(self, rng):
        n, rows = self.board_size, np.arange(self.batch_size)
        cell, colour = rng.integers(0, n * (n - 1), self.batch_size), rng.integers(0, 2, self.batch_size)
        board = np.zeros((self.batch_size, 3, n, n), np.float32)
        board[rows, colour, cell // n, cell % n] = 1
        board[:, 2] = (1 - colour)[:, None, None]
        return dict(board=torch.from_numpy(board), policy=torch.from_numpy(cell + n), value=torch.from_numpy(colour[:, None].astype(np.float32)))


def write_shards(directory, rows=1200, board_size=4, seed=0, rows_per_shard=200):
    "Shards of positions with a few stones; the best move is the first empty cell, and red wins where the first cell is red."
    rng, cells = rng_for(seed, 'shards'), board_size**2
    order, stones = rng.permuted(np.tile(np.arange(cells), (rows, 1)), axis=1), rng.integers(2, cells // 2, rows)
    colours = np.zeros((rows, cells), np.int8)
    for ply in range(stones.max()): colours[np.arange(rows), order[:, ply]] = np.where(ply < stones, 1 + ply % 2, 0)
    planes = [colours == 1, colours == 2, np.repeat(stones[:, None] % 2, cells, 1)]
    board = np.stack(planes, 1).reshape(rows, 3, board_size, board_size)
    codec = HexCodec(board_size)
    records = codec.encode(board, (colours == 0).argmax(1), (colours[:, 0] == 2).astype(int))
    with ShardWriter(directory, codec, rows_per_shard) as writer: writer.append(records, np.arange(rows) // 10 + (seed << 32))
    return directory
