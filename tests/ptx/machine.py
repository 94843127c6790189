"""The threads of a kernel, in lockstep."""

import re
from collections import Counter

import numpy as np

from tests.ptx import Fault, arithmetic, matrix
from tests.ptx.memory import SHARED_BASE, Global, Shared, Threads
from tests.ptx.program import Instruction, Program

_TOGETHER = 64  # blocks
_REGISTERS = {"%p": np.bool_, "%rs": np.uint16, "%r": np.uint32, "%rd": np.uint64}
_NOTHING = re.compile(r"griddepcontrol|wgmma\.fence|bar\.warp\.sync|membar|nanosleep")


def run(
    program: Program, grid: tuple[int, ...], given: list[np.ndarray], like: list[np.ndarray]
) -> tuple[list, Counter]:
    """The arrays, shaped like ``like``, that the kernel writes, and how many warps executed each instruction."""
    memory = Global(given, like)
    counts = run_in(memory, program, grid, memory.addresses)
    return memory.arrays(like), counts


def run_in(memory, program: Program, grid: tuple[int, ...], parameters: list[int | float], *, strict=True) -> Counter:
    """Like ``run``, with a given memory and all parameters. Unless ``strict``, products read memory when they are issued,
    need no proxy fence after writes and copies, and a register that was never written is NaN."""
    counts: Counter = Counter()
    grid = (*grid, *[1] * (3 - len(grid)))
    blocks = int(np.prod(grid))
    for first in range(0, blocks, _TOGETHER):
        numbers = np.arange(first, min(first + _TOGETHER, blocks))
        _Blocks(program, grid, numbers, memory, parameters, counts, strict).run()
    return counts


class _Blocks:
    def __init__(self, program: Program, grid, numbers: np.ndarray, memory, parameters, counts: Counter, strict: bool):
        self.program, self.memory, self.parameters = program, memory, parameters
        self.counts, self.strict, self.shared = counts, strict, Shared(len(numbers), strict)
        self.block = np.repeat(np.arange(len(numbers)), program.threads)
        thread = np.tile(np.arange(program.threads), len(numbers))
        self.warp, self.number = thread // 32, numbers[self.block]
        x, y = grid[:2]
        self.special = {
            "%tid.x": thread.astype(np.uint32),
            "%ctaid.x": (self.number % x).astype(np.uint32),
            "%ctaid.y": (self.number // x % y).astype(np.uint32),
            "%ctaid.z": (self.number // (x * y)).astype(np.uint32),
        }
        self.everyone = np.ones(len(thread), bool)
        self.barriers = np.zeros(len(numbers), np.int32)
        self.registers: dict[str, np.ndarray] = {}
        self.copies, self.products = _Groups(len(numbers)), _Groups(len(numbers))
        self.sums: dict[str, np.ndarray] = {}  # registers of products in flight, and in which blocks
        self.factors: dict[str, np.ndarray] = {}
        self.active = self.everyone

    def run(self) -> None:
        """The threads that are behind go first, and so catch up with the others."""
        waiting = {0: self.everyone}
        while waiting:
            at = min(waiting)
            active = waiting.pop(at)
            instruction = self.program.instructions[at]
            if instruction.opcode in ("ret", "exit"):
                self._meet(waiting, at + 1, active & ~self._where(instruction, active))
                continue
            goes_on = active
            self._count(instruction, active)
            if instruction.opcode.startswith("bra"):
                taken = self._where(instruction, active)
                self._meet(waiting, self.program.labels[instruction.operands[0]], taken)
                goes_on = self._known(active & ~taken)
            elif (where := self._where(instruction, active)).any():
                self._take(instruction, where)
            self._meet(waiting, at + 1, goes_on)
        for name, groups in (("copies", self.copies), ("products", self.products)):
            if groups.unended():
                raise Fault(f"the kernel ends before its {name} do")

    def _meet(self, waiting: dict[int, np.ndarray], at: int, active: np.ndarray) -> None:
        if active is self.everyone or active.any():
            waiting[at] = self._known(waiting[at] | active) if at in waiting else active

    def _known(self, where: np.ndarray) -> np.ndarray:
        """``everyone`` itself if it is all threads, as for most instructions, whose cost here is Python's overhead."""
        return self.everyone if where.all() else where

    def _count(self, instruction: Instruction, where: np.ndarray) -> None:
        warps = len(where) // 32 if where is self.everyone else where.reshape(-1, 32).any(axis=1).sum()
        self.counts[instruction.opcode] += int(warps)

    def _where(self, instruction: Instruction, active: np.ndarray) -> np.ndarray:
        if instruction.predicate is None:
            return active
        return self._known(active & (self._register(instruction.predicate) ^ instruction.unless))

    # Operands

    def _register(self, name: str) -> np.ndarray:
        if name in self.special:
            return self.special[name]
        if name not in self.registers:
            if not self.strict:
                return ~np.zeros(self.block.shape, _REGISTERS[name.rstrip("0123456789")])
            raise Fault(f"{name} is read before anything is written there")
        self._refuse_busy(self.sums, name)
        return self.registers[name]

    def _refuse_busy(self, busy: dict[str, np.ndarray], name: str) -> None:
        if name in busy and busy[name].any() and busy[name][self.block[self.active]].any():
            raise Fault(f"{name} is of a product that may not have ended")

    def _value(self, operand, kind: str) -> np.ndarray:
        """The operand as the named type: one number for all threads, or one for each."""
        to = np.dtype(arithmetic.TYPES[kind])
        if isinstance(operand, list):  # the least significant first
            return self._packed([self._value(x, f"b{to.itemsize * 8 // len(operand)}") for x in operand], to)
        if operand.startswith("!"):
            return ~self._value(operand[1:], kind)
        if operand.startswith("%"):
            x = self._register(operand)
            return x.view(to) if x.dtype.itemsize == to.itemsize else x.astype(f"u{to.itemsize}").view(to)
        if operand.startswith("0f"):
            return np.array([int(operand[2:], 16)], np.uint32).view(to)[0]
        if operand == "global_smem":
            return np.array(SHARED_BASE, to)
        number = int(operand.rstrip("U"), 0)
        if to == np.bool_:
            return np.array(number != 0)
        if kind[0] in "bfus" and to.kind not in "ui":
            return np.array([number], f"i{to.itemsize}").view(to)[0]
        return np.array(number & (1 << to.itemsize * 8) - 1, f"u{to.itemsize}").view(to)

    def _packed(self, parts: list[np.ndarray], to: np.dtype) -> np.ndarray:
        lanes = [np.broadcast_to(x, self.block.shape) for x in parts]
        return np.ascontiguousarray(np.stack(lanes, axis=-1)).view(to).reshape(-1)

    def _lanes(self, operand, kind: str) -> np.ndarray:
        value = self._value(operand, kind)
        return value if value.shape == self.block.shape else np.broadcast_to(value, self.block.shape)

    def _write(self, operand, value: np.ndarray, where: np.ndarray) -> None:
        if value.shape != self.block.shape:
            value = np.broadcast_to(value, self.block.shape)
        if isinstance(operand, list):
            parts = np.ascontiguousarray(value).view(f"u{value.dtype.itemsize // len(operand)}").reshape(len(value), -1)
            for name, part in zip(operand, parts.T, strict=True):
                self._write(name, part, where)
        elif operand != "_":
            raw = value if value.dtype == np.bool_ else np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")
            if where is not self.everyone:  # others keep theirs; what was never written is NaN
                raw = np.where(where, raw, self.registers.get(operand, ~np.zeros((), raw.dtype)))
            self._refuse_busy(self.sums, operand)
            self._refuse_busy(self.factors, operand)
            self.registers[operand] = np.ascontiguousarray(raw)

    def _address(self, operand: tuple[str, int], where: np.ndarray) -> np.ndarray:
        name, offset = operand
        return self._lanes(name, "u64")[where].astype(np.int64) + offset

    def _threads(self, where: np.ndarray) -> Threads:
        block = self.block[where]
        return Threads(block, self.warp[where], self.barriers[block], self.number[where])

    # Instructions

    def _take(self, instruction: Instruction, where: np.ndarray) -> None:
        opcode, operands, self.active = instruction.opcode, instruction.operands, where
        if _NOTHING.match(opcode):
            return
        if opcode.startswith("ld.param"):
            parameter = self.parameters[self.program.parameters.index(operands[1][0])]
            kind = np.float32 if isinstance(parameter, float) else np.dtype(f"u{int(opcode[-2:]) // 8}")
            self._write(operands[0], np.asarray(parameter).astype(kind), where)
        elif found := re.match(r"(ld|st)\.(global|shared)\b", opcode):
            getattr(self, {"ld": "_load", "st": "_store"}[found[1]])(instruction, where)
        elif opcode == "bar.sync":
            self._whole("warp of a block", where, self.program.threads)
            self.barriers[np.unique(self.block[where])] += 1
        elif opcode.startswith("cp.async"):
            self._copy(instruction, where)
        elif opcode.startswith("shfl"):
            self._shuffle(instruction, where)
        elif opcode.startswith("fence.proxy.async"):
            self.shared.fence(self._threads(where))
        elif opcode.startswith(("ldmatrix", "stmatrix", "mma.")):
            self._whole("thread of a warp", where, 32)
            self._matrices(instruction, where)
        elif opcode.startswith("wgmma.commit_group"):
            self._whole_blocks(where)
            self.products.commit(np.unique(self.block[where]))
        elif opcode.startswith("wgmma.wait_group"):
            self._whole_blocks(where)
            self._end_products(int(operands[0]), where)
        elif opcode.startswith("wgmma"):
            self._whole("thread of a warpgroup", where, 128)
            self._product(instruction, where)
        else:
            value = arithmetic.apply(opcode, lambda i, kind: self._value(operands[i + 1], kind))
            self._write(operands[0], value, where)

    def _whole(self, of: str, where: np.ndarray, count: int) -> None:
        if where is self.everyone:
            return
        groups = where.reshape(-1, count)
        if (groups.any(axis=1) != groups.all(axis=1)).any():
            raise Fault(f"not every {of} comes to an instruction for all")

    def _whole_blocks(self, where: np.ndarray) -> None:
        """Groups are tracked per block, although threads and warpgroups may have their own."""
        groups = where.reshape(-1, self.program.threads)
        if (groups.any(axis=1) != groups.all(axis=1)).any():
            raise NotImplementedError("groups of a part of a block")

    @staticmethod
    def _unit_and_names(opcode: str, operand) -> tuple[int, list[str]]:
        return int(re.search(r"[bsuf](\d+)$", opcode)[1]) // 8, operand if isinstance(operand, list) else [operand]

    def _load(self, instruction: Instruction, where: np.ndarray) -> None:
        opcode, (to, address) = instruction.opcode, instruction.operands
        unit, names = self._unit_and_names(opcode, to)
        memory = self.memory if ".global" in opcode else self.shared
        found = memory.load(self._address(address, where), unit, len(names), self._threads(where))
        for name, values in zip(names, found.T, strict=True):
            lanes = np.zeros(len(where), values.dtype)
            lanes[where] = values
            if unit == 1 or opcode.endswith("s16"):  # registers are wider
                lanes = lanes.view(f"{'i' if '.s' in opcode[-4:] else 'u'}{unit}")
                lanes = lanes.astype(np.int16 if name.startswith("%rs") else np.int32)
            self._write(name, lanes, where)

    def _store(self, instruction: Instruction, where: np.ndarray) -> None:
        opcode, (address, given) = instruction.opcode, instruction.operands
        unit, names = self._unit_and_names(opcode, given)
        values = np.stack([self._lanes(name, f"b{8 * unit}")[where] for name in names], axis=1)
        memory = self.memory if ".global" in opcode else self.shared
        memory.store(self._address(address, where), values, self._threads(where))

    def _copy(self, instruction: Instruction, where: np.ndarray) -> None:
        opcode, operands = instruction.opcode, instruction.operands
        blocks = np.unique(self.block[where])
        if opcode == "cp.async.commit_group":
            self._whole_blocks(where)
            self.copies.commit(blocks)
        elif opcode == "cp.async.wait_group":
            self._whole_blocks(where)
            for (halves, values, threads), of in self.copies.wait(blocks, int(operands[0])):
                mine = np.isin(threads.block, of)
                who = Threads(*(x[mine] for x in threads))._replace(epoch=self.barriers[threads.block[mine]])
                self.shared.end_copy(halves[mine], values[mine], who)
        else:
            size, threads = int(operands[2], 0), self._threads(where)
            taken = self._taken(operands[3:], size)[where]
            values, some = np.zeros((len(taken), size // 2), np.uint16), taken > 0
            if not np.isin(taken, (0, size)).all():
                raise NotImplementedError("a copy of a part")
            if some.any():
                of_some = Threads(*(x[some] for x in threads))
                values[some] = self.memory.load(self._address(operands[1], where)[some], 2, size // 2, of_some)
            to = self.shared.begin_copy(self._address(operands[0], where), size, threads)
            self.copies.add((to, values, threads), blocks)

    def _taken(self, last: tuple, size: int) -> np.ndarray:
        """How many bytes each thread reads; the rest are zeros. The last operand, if there is one, is that number, or
        a predicate that makes it zero."""
        if not last:
            return np.full(self.block.shape, size)
        if last[0].startswith("%p"):
            return np.where(self._lanes(last[0], "pred"), 0, size)
        return self._lanes(last[0], "u32")

    def _shuffle(self, instruction: Instruction, where: np.ndarray) -> None:
        self._whole("thread of a warp", where, 32)
        mode, (to, x, by, ends, _) = instruction.opcode.split(".")[2], instruction.operands
        if int(ends, 0) != (0 if mode == "up" else 31):
            raise NotImplementedError(f"{instruction.opcode} of a part of a warp")
        lane, by = np.arange(len(where)) % 32, self._lanes(by, "u32").astype(np.int64)
        source = {"bfly": lane ^ by, "idx": by % 32, "up": lane - by, "down": lane + by}[mode]
        source = np.where((source < 0) | (source > 31), lane, source)
        self._write(to, self._lanes(x, "b32")[np.arange(len(where)) - lane + source], where)

    def _matrices(self, instruction: Instruction, where: np.ndarray) -> None:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode.startswith("mma"):
            given = [[self._lanes(x, "b32")[where] for x in names] for names in operands[1:3]]
            to, found = operands[0], matrix.mma(opcode, *given, [self._lanes(x, "f32")[where] for x in operands[3]])
        elif opcode.startswith("stmatrix"):
            address, names = operands
            values = [self._lanes(x, "b32")[where] for x in names]
            at = self._address(address, where)
            return matrix.store_matrices(".trans" in opcode, at, values, self.shared, self._threads(where))
        else:
            to, address = operands
            at = self._address(address, where)
            found = matrix.load_matrices(len(to), ".trans" in opcode, at, self.shared, self._threads(where))
        for name, values in zip(to, found, strict=True):
            self._give(name, values, where)

    def _give(self, name: str, values: np.ndarray, where: np.ndarray) -> None:
        lanes = np.zeros(len(where), values.dtype)
        lanes[where] = values
        self._write(name, lanes, where)

    def _product(self, instruction: Instruction, where: np.ndarray) -> None:
        sums, left, right, keep, *signs = instruction.operands
        if signs[:2] != ["1", "1"]:
            raise NotImplementedError(f"signs {signs}")
        turned = signs[2:]  # which operands in memory are transposed, if there is a choice
        product, threads = matrix.Product(instruction.opcode), self._threads(where)
        described = not isinstance(left, list)
        given = self._lanes(left, "b64")[where] if described else [self._lanes(x, "b32")[where] for x in left]
        a = product.left(given, described and turned[:1] == ["1"], self.shared, threads)
        b = product.right(self._lanes(right, "b64")[where], turned[-1:] == ["1"], self.shared, threads)
        keep = self._lanes(keep, "pred")[where]
        blocks = np.unique(self.block[where])
        for (_, others, _), of in self.products.all():
            if others == sums:  # products follow each other in the same registers
                for name in sums:
                    self._mark_busy(self.sums, name, of, False)
        with np.errstate(all="ignore"):
            for name, values in zip(sums, product.sums(a @ b), strict=True):
                if keep.any():
                    values = values + np.where(keep, self._lanes(name, "f32")[where], np.float32(0))
                self._give(name, values, where)
        factors = left if isinstance(left, list) else []
        self.products.add((product.read, sums, factors), blocks)
        self._mark_product(sums, factors, blocks)

    def _end_products(self, left: int, where: np.ndarray) -> None:
        """Ends all but the last ``left`` groups; until then they may read their operands."""
        blocks, ended = np.unique(self.block[where]), []
        for (read, sums, factors), of in self.products.wait(blocks, left):
            for halves, who in read:
                mine = np.isin(who.block, of)
                threads = Threads(*(x[mine] for x in who))._replace(epoch=self.barriers[who.block[mine]])
                ended.append((halves[mine], threads))
            for busy, names in ((self.sums, sums), (self.factors, factors)):
                for name in names:
                    self._mark_busy(busy, name, of, False)
        others = [halves[np.isin(who.block, of)] for (read, *_), of in self.products.all() for halves, who in read]
        self.shared.end_products(ended, others)
        for (_, sums, factors), of in self.products.all():
            self._mark_product(sums, factors, of)

    def _mark_product(self, sums: list[str], factors: list[str], blocks) -> None:
        for busy, names in ((self.sums, sums), (self.factors, factors)):
            for name in names:
                self._mark_busy(busy, name, blocks, True)

    def _mark_busy(self, busy: dict[str, np.ndarray], name: str, blocks, value: bool) -> None:
        if name not in busy:
            busy[name] = np.zeros(len(self.barriers), bool)
        busy[name][blocks] = value


class _Groups:
    """Asynchronous work: for each block, groups that are waited for in order."""

    def __init__(self, blocks: int):
        self._open: list[list] = [[] for _ in range(blocks)]
        self._committed: list[list[list]] = [[] for _ in range(blocks)]

    def add(self, item, blocks: np.ndarray) -> None:
        """Adds one item for all these blocks."""
        for block in blocks:
            self._open[block].append(item)

    def commit(self, blocks: np.ndarray) -> None:
        for block in blocks:
            self._committed[block].append(self._open[block])
            self._open[block] = []

    def wait(self, blocks: np.ndarray, left: int) -> list[tuple]:
        """Ends all but ``left`` groups: returns each item, and for which blocks it ends."""
        ended = []
        for block in blocks:
            groups = self._committed[block]
            count = max(0, len(groups) - left)
            ended += [(block, item) for group in groups[:count] for item in group]
            del groups[:count]
        return self._by_item(ended)

    def all(self) -> list[tuple]:
        """The items in flight, and for which blocks."""
        both = zip(self._open, self._committed, strict=True)
        every = [
            (block, item) for block, (now, groups) in enumerate(both) for group in (*groups, now) for item in group
        ]
        return self._by_item(every)

    def unended(self) -> bool:
        return bool(self.all())

    @staticmethod
    def _by_item(pairs: list[tuple]) -> list[tuple]:
        found: dict[int, tuple] = {}
        for block, item in pairs:
            found.setdefault(id(item), (item, []))[1].append(block)
        return list(found.values())
