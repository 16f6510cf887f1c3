"""Steps of decoding: what the compiled program is told of a decoder, its adapters and its cache.

All that stays the same is gathered once into tables of sizes and addresses, so that a step, which reads the whole base
in a few milliseconds, costs Python one call. Where activations are quantised, prompts are read by the same program.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thimble.backends.session import Pass
from thimble.backends.torch import decode_program as columns
from thimble.backends.torch.adapters import ActiveAdapter
from thimble.backends.torch.block_products import RUN, form_of, product_kernel
from thimble.backends.torch.decode_program import decode_program
from thimble.backends.torch.decoder import Block, Decoder
from thimble.backends.torch.elementwise import RmsNorm
from thimble.backends.torch.frozen import DenseMatrix, FileMatrix, FrozenLinear, Matrix
from thimble.backends.torch.gang import run_together
from thimble.backends.torch.kv_cache import KvCache, place_rows
from thimble.backends.torch.lora_rows import look_up
from thimble.backends.torch.paged import BLOCK_TOKENS
from thimble.backends.torch.threads import num_cores
from thimble.core.metrics import LossSum

FLOAT_TOKENS = 16  # more are faster in large products, where activations stay float32
MOST_TOKENS = 256  # that run through all blocks at once: activations of more would leave the cache
NO_WINDOW = 1 << 40  # keys that are seen where there is no window
_WHOLE = -1  # key of an adapter's table of all jobs, beside those of its groups of projections
CODES = {torch.float32: "F32", torch.bfloat16: "BF16"}
Table = NDArray[np.int64]
Read = Callable[[Pass, KvCache], tuple[NDArray[np.float32], LossSum]]


class _Known(NamedTuple):
    """What was gathered of an adapter."""

    table: Table  # (jobs, LOW)
    ranks: int  # most of a projection


class DecodeStep:
    """The compiled step of a decoder.

    Args:
        decoder: One that `can_run`.
        is_int8: Whether activations are quantised before they meet weights in blocks.
    """

    def __init__(self, decoder: Decoder, is_int8: bool) -> None:
        self._decoder, self._may_be_int8 = decoder, is_int8
        self._forms: set[str] = set()  # of products
        self._alive: list[Any] = []  # arrays whose addresses stand in a table
        self._paths: list[str] = []  # of the layer of each job; the head's is empty
        jobs: list[Table] = []
        phases = [phase for block in decoder.blocks for phase in self._block(block, jobs)]
        self.reads_prompts = "float" not in self._forms  # whole numbers are as fast for many tokens as for one
        phases += self._head(jobs)
        self._is_int8 = self._forms != {"float"}
        self._phases, self._jobs = np.stack(phases), np.stack(jobs)
        self._blocks = [block.rope for block in decoder.blocks]
        spec, attention = decoder.spec, decoder.blocks[0].attention
        softcaps = attention.softcap or 0, spec.final_softcap or 0
        self._numbers = np.array([spec.norm_eps, attention.scale, *softcaps], np.float32)
        self.most_tokens = 1 << 30 if self._is_int8 else FLOAT_TOKENS  # that the step is for
        self._lock = threading.Lock()  # a step uses all cores anyway

    @staticmethod
    def can_run(decoder: Decoder) -> bool:
        """Whether the weights are kept in a way that the step can read."""
        linears = [decoder.head, *(projection.frozen for projection in decoder.projections)]
        return all(_is_readable(linear) for linear in linears)

    # ---- tables ---------------------------------------------------------------------------------------------------

    def _address(self, array: NDArray[Any] | Tensor) -> int:
        """Where an array is, which is kept alive from now on."""
        self._alive.append(array)
        return int(array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data)

    def _norm(self, norm: RmsNorm | None) -> int:
        return 0 if norm is None else self._address(norm.weight.contiguous())

    def _add_jobs(self, linear: FrozenLinear, places: dict[str, slice], jobs: list[Table]) -> dict[str, int]:
        """Add the matrices of a group of layers to the table: where they stand there, as columns of a phase."""
        first = len(jobs)
        bias = None if linear.bias is None else linear.bias.float()
        for path, place in places.items():
            job = np.zeros(len(columns.JOB), np.int64)
            job[columns.ROWS], job[columns.COLUMNS] = place.stop - place.start, linear.cols
            job[columns.FIRST], job[columns.WIDTH] = place.start, linear.rows
            job[columns.BIAS] = 0 if bias is None else self._address(bias) + bias.itemsize * place.start
            start = 0
            for matrix in linear.matrices:
                if start <= place.start < start + matrix.rows:
                    self._locate(job, matrix, place.start - start)
                start += matrix.rows
            jobs.append(job)
            self._paths.append(path)
        return {"JOBS": first, "END": len(jobs)}

    def _kernel(self, dtype: str) -> int:
        form = form_of(dtype, self._may_be_int8)
        self._forms.add(form)
        return product_kernel(dtype, form)

    def _locate(self, job: Table, matrix: Matrix, row: int) -> None:
        """Say where the rows of a matrix lie, from one of them on."""
        if isinstance(matrix, FileMatrix):
            job[columns.KERNEL], job[columns.ROW_BYTES] = self._kernel(matrix.weight.dtype), matrix.raw.strides[0]
            job[columns.WEIGHTS] = self._address(matrix.raw)
            if matrix.weight.order is not None:
                job[columns.INDEX] = self._address(matrix.index) + matrix.index.itemsize * row
                return
        elif matrix.dense is not None:
            job[columns.KERNEL] = self._kernel(CODES[matrix.dense.dtype])
            job[columns.ROW_BYTES] = matrix.dense.itemsize * matrix.cols
            job[columns.WEIGHTS] = self._address(matrix.dense)
        job[columns.WEIGHTS] += row * job[columns.ROW_BYTES]

    def _block(self, block: Block, jobs: list[Table]) -> list[Table]:
        """The phases of a block."""
        attention = block.attention
        qkv, out, gate_up, down = (self._add_jobs(p.frozen, p.columns, jobs) for p in block.projections)
        if attention.bias is not None:
            for job in jobs[qkv["JOBS"] : qkv["END"]]:
                job[columns.BIAS] = self._address(attention.bias) + attention.bias.itemsize * job[columns.FIRST]
        heads = {
            "BLOCK": block.number, "Q_NORM": self._norm(attention.q_norm), "K_NORM": self._norm(attention.k_norm),
            "WINDOW": attention.window or NO_WINDOW,
        }  # fmt: skip
        y = {"TO": columns.Y}
        return [
            _phase("NORMALISE", NORM=self._norm(block.attn_norm)), _phase("LOWER", **qkv),
            _phase("MULTIPLY", **qkv, **y), _phase("PLACE", **heads), _phase("ATTEND", **heads),
            _phase("QUANTIZE", **out), _phase("LOWER", **out), *self._updates(out, block.attn_out_norm),
            _phase("NORMALISE", NORM=self._norm(block.mlp_norm)), _phase("LOWER", **gate_up),
            _phase("MULTIPLY", **gate_up, **y), _phase("GATE", **down), _phase("LOWER", **down),
            *self._updates(down, block.mlp_out_norm),
        ]  # fmt: skip

    def _updates(self, jobs: dict[str, int], norm: RmsNorm | None) -> list[Table]:
        """A product that is added to the residual stream, which Gemma normalises first."""
        if norm is None:
            return [_phase("UPDATE", **jobs, TO=columns.Y)]
        return [_phase("MULTIPLY", **jobs, TO=columns.Y), _phase("ADD_NORMALISED", NORM=self._norm(norm))]

    def _head(self, jobs: list[Table]) -> list[Table]:
        head = self._decoder.head
        found = self._add_jobs(head, {"": slice(0, head.rows)}, jobs)
        norm = _phase("NORMALISE", NORM=self._norm(self._decoder.norm), IS_HEAD=1)
        return [norm, _phase("MULTIPLY", **found, TO=columns.LOGITS, IS_HEAD=1)]

    def gathered(self, adapter: ActiveAdapter) -> _Known:
        """What the step is told of an adapter, kept with it until its values change."""
        known: _Known | None = adapter.tables.get(_WHOLE)
        if known is None:
            known = adapter.tables[_WHOLE] = self._gather(adapter)
        return known

    def _gather(self, adapter: ActiveAdapter) -> _Known:
        table, most = np.zeros((len(self._jobs), len(columns.LOW)), np.int64), 0
        job_of = {path: number for number, path in enumerate(self._paths)}
        for projection in self._decoder.projections:
            layers = look_up(adapter, projection.number, projection.columns).layers
            for (path, _, factors, place), layer in zip(projection.adapted(adapter.layers), layers, strict=True):
                row = table[job_of[path]]
                row[columns.A], (row[columns.B], row[columns.RATES]) = factors.A.data_ptr(), layer[1:3]
                row[columns.RANKS], row[columns.LOW_FIRST] = len(factors.A), place.start
                row[columns.SCALE] = np.float32(factors.scale).view(np.int32)
                most = max(most, place.stop)
        return _Known(table, most)

    # ---- running --------------------------------------------------------------------------------------------------

    def forward(self, one: Pass, cache: KvCache, read: Read) -> tuple[NDArray[np.float32], LossSum]:
        """Read a pass: what the step is not for, or too much for it, by `read`. See Session.forward."""
        if self.reads_prompts and one.labels is None:
            return self.run(one, cache), LossSum()
        is_written = np.repeat([row.is_written for row in one.rows], [row.tokens for row in one.rows])
        if not 0 < np.count_nonzero(is_written) <= self.most_tokens:
            return read(one, cache)
        written, given = one.part(is_written), one.part(~is_written)
        logits = self.run(written, cache)
        if not given.rows:
            return logits, LossSum()
        others, loss = read(given, cache)
        of_written = is_written[list(one.ends)]
        both = np.empty((len(of_written), logits.shape[1]), np.float32)
        both[of_written], both[~of_written] = logits, others
        return both, loss

    def run(self, one: Pass, cache: KvCache) -> NDArray[np.float32]:
        """Read the next tokens of some requests: logits after those that are asked for, float32 (ends, vocabulary).

        Nothing that a token comes to depends on what else is read with it, or on how much is read at once.
        """
        places = place_rows(one.rows, cache)
        distinct = list({id(row.adapter): row.adapter for row in one.rows if row.adapter.layers}.values())
        known = [self.gathered(adapter) for adapter in distinct]
        adapters = np.array([one.table for one in known], np.int64).reshape(-1, len(self._jobs), len(columns.LOW))
        chosen = np.array([distinct.index(row.adapter) if row.adapter.layers else -1 for row in one.rows], np.int64)
        of_token, ends = chosen[places.row_of], np.array([row.end for row in one.rows])[places.row_of]
        wanted, ranks = np.array(one.ends, np.int64), max((one.ranks for one in known), default=0)
        logits = np.empty((len(wanted), self._decoder.head.rows), np.float32)
        with self._lock:
            for start in range(0, len(one.ids), MOST_TOKENS):
                part = slice(start, min(start + MOST_TOKENS, len(one.ids)))
                own = slice(*np.searchsorted(wanted, [part.start, part.stop]).tolist())
                positions, order = places.positions[part], wanted[own] - start
                phases, angles = self._turned(positions, ends[part], bool(known))
                rooms, arrays = self._rooms(one.ids[part], int(positions.max()), ranks, order, logits[own], cache)
                run_together(
                    decode_program(CODES[self._decoder.compute], cache.kind), phases, self._jobs, rooms, self._numbers,
                    positions, places.row_of[part], places.tables, adapters, of_token[part],
                )  # fmt: skip
                del angles, arrays  # whose addresses stood in the tables
        return logits

    def _turned(self, positions: Table, ends: Table, has_adapters: bool) -> tuple[Table, list[Any]]:
        """The phases of a step, with the angles of its tokens, and these."""
        phases = self._phases.copy() if has_adapters else self._phases[self._phases[:, columns.KIND] != columns.LOWER]
        angles = self._decoder.angles(positions, ends, len(positions))
        is_place = phases[:, columns.KIND] == columns.PLACE
        for number, angle in angles.items():
            own = np.flatnonzero(is_place)[[rope == number for rope in self._blocks]]
            phases[own, columns.COS], phases[own, columns.SIN] = angle.cos.data_ptr(), angle.sin.data_ptr()
            phases[own, columns.ANGLES] = angle.cos.shape[1]
        return phases, list(angles.values())

    def _rooms(
        self, ids: NDArray[np.int32], last: int, ranks: int, wanted: Table, logits: NDArray[np.float32], cache: KvCache
    ) -> tuple[Table, list[Any]]:
        """The table of the room of the blocks and that of the head, and the arrays whose addresses stand there."""
        decoder, count, attention = self._decoder, len(ids), self._decoder.blocks[0].attention
        widest = int(self._jobs[:, columns.COLUMNS].max())
        x = decoder.embed(ids, count).float().contiguous()
        sizes = {
            "H": (widest, torch.float32), "Q": (widest, torch.int8), "SCALES": (widest // RUN, torch.float32),
            "SUMS": (widest // RUN, torch.float32), "Y": (int(self._jobs[:-1, columns.WIDTH].max()), torch.float32),
            "LOWS": (ranks, torch.float32),
        }  # fmt: skip
        arrays = {name: decoder.memory.scratch(f"step {name}", count, *size) for name, size in sizes.items()}
        most_keys = (last // BLOCK_TOKENS + 1) * BLOCK_TOKENS
        queries = num_cores() * attention.group
        arrays["SCORES"] = decoder.memory.scratch("step scores", queries, most_keys, torch.float32)
        room = np.zeros(len(columns.ROOM), np.int64)
        room[columns.T], room[columns.HIDDEN], room[columns.X] = count, x.shape[1], x.data_ptr()
        room[columns.IS_INT8], room[columns.IS_SILU] = self._is_int8, decoder.gate.activation == "silu"
        room[columns.HEADS], room[columns.KV_HEADS] = attention.num_heads, attention.num_kv_heads
        room[columns.DIM], room[columns.LOWS_WIDTH], room[columns.MOST_KEYS] = attention.head_dim, ranks, most_keys
        room[columns.HEAD_BYTES] = cache.head_bytes
        for name, array in arrays.items():
            room[getattr(columns, name)] = array.data_ptr()
        head = room.copy()
        head[columns.T], head[columns.WANTED] = len(wanted), wanted.ctypes.data
        head[columns.LOGITS] = logits.ctypes.data
        return np.stack([room, head]), [x, wanted, *arrays.values()]


def _is_readable(linear: FrozenLinear) -> bool:
    is_kept = all(isinstance(matrix, DenseMatrix | FileMatrix) for matrix in linear.matrices)
    return is_kept and bool(linear.matrices) and linear.neighbours is None


def _phase(kind: str, **fields: int) -> Table:
    """A row of the table of phases."""
    phase = np.zeros(len(columns.PHASE), np.int64)
    phase[columns.KIND] = getattr(columns, kind)
    for name, value in fields.items():
        phase[getattr(columns, name)] = value
    return phase
