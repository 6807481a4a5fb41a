"""Decodes the PTX that Triton compiles, for `execute`. What is not known is refused, with every
modifier."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

OPS = """
MOV PACK UNPACK ADD SUB MUL FMA MULHI MULWIDE MADWIDE DIV REM MIN MAX NEG ABS SQRT EX2 LG2
RCP RSQRT AND OR XOR NOT SHL SHR BFE PRMT SETP SELP CVT LD ST CPASYNC CPCOMMIT CPWAIT BAR
WARPSYNC SHFL LDMATRIX STMATRIX MMA_TF32 MMA_F64 WGMMA REDUX FMAMIXED PROXYFENCE BRA RET
NOP
""".split()
TYPES = "PRED U8 S8 U16 S16 U32 S32 U64 S64 F16 BF16 F32 F64 BF16X2 F16X2 F32X2".split()
OP = {name: n for n, name in enumerate(OPS)}
TY = {name: n for n, name in enumerate(TYPES)}
CMP = "eq ne lt le gt ge equ neu ltu leu gtu geu num nan".split()
INSTRUCTION = np.dtype(
    [(n, "<i4") for n in "op ty ty2 mod pred neg d nd s ns vec imm".split()] + [("used", "<u8")]
)


class Unsupported(Exception):
    """An instruction, or a use of one, that is not known."""


INT = {"b": "U", "u": "U", "s": "S", "f": "F"}


def number_type(t: str) -> str:
    """The type of an operand, as b32 -> U32."""
    if t in ("pred", "bf16", "f32x2"):
        return t.upper()
    m = re.fullmatch(r"([busf])(8|16|32|64)", t)
    if not m:
        raise Unsupported(f"type {t}")
    return INT[m[1]] + m[2]


class Program:
    """A decoded kernel."""

    def __init__(self, ptx: str):
        self.files = dict(re.findall(r'(?m)^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx))
        if re.search(r"(?m)^\s*\.shared|\.func\b", ptx):
            raise Unsupported("static shared memory or a function")
        entry = ptx[ptx.index(".entry") :]
        head, body = entry[: entry.index("\n{")], entry[entry.index("\n{") + 2 :]
        body = body[: body.index("$L__func_end0")]
        self.params = re.findall(
            r"\.param\s+\.(\w+)\s[^,()]*?(\w+)\s*(?:,|$|\n)", head[head.index("(") + 1 :]
        )
        self.names = {name for _, name in self.params}
        self.threads = int(re.search(r"\.reqntid (\d+)", entry)[1])
        self.rows: dict[str, int] = {}
        self.local: set[str] = set()  # registers of inline assembly
        self.constants: dict[int, int] = {}
        self.pool: list[int] = []
        self.text: list[str] = []
        self.where: list[str] = []
        self.instructions: list[tuple[int, ...]] = []
        self.decode(body)

    # ---- text to instructions ----
    def decode(self, body: str) -> None:
        labels: dict[str, int] = {}
        branches: list[tuple[int, str]] = []
        place, used, statement = "?", None, ""
        todo: list[tuple[str, str, int | None]] = []
        for line in body.splitlines():
            line = line.split("//")[0].strip()
            if m := re.match(r"\.loc\s+(\d+)\s+(\d+)", line):
                place = f"{Path(self.files.get(m[1], '?')).name}:{m[2]}"
                continue
            if m := re.match(r'\.pragma\s+"used_bytes_mask (0x[0-9a-f]+)"', line):
                used = int(m[1], 16)
                continue
            while m := re.match(r"([$\w]+):(?!:)\s*", line):
                labels[m[1]] = len(todo)
                line = line[m.end() :]
            if not line or line.startswith((".reg", ".pragma", ".file")):
                continue
            statement += " " + line
            *whole, statement = re.split(r";", statement)
            for one in whole:
                one = re.sub(r"^[\s{}]*(?=[@a-z.])", "", one.strip())
                if one.startswith(".reg"):
                    self.local |= set(re.findall(r"\w+", one.split(None, 2)[2]))
                elif one:
                    todo.append((one, place, used))
                    used = None
            if not re.sub(r"[\s{}]", "", statement):
                statement = ""
        for text, place, used in todo:
            m = re.match(r"^(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", text)
            if not m:
                raise Unsupported(text)
            operands, depth, current = [], 0, ""
            for ch in m[4]:
                depth += (ch in "{[") - (ch in "}]")
                if ch == "," and not depth:
                    operands.append(current.strip())
                    current = ""
                else:
                    current += ch
            if current.strip():
                operands.append(current.strip())
            self.text.append(text)
            self.where.append(place)
            pred = self.row(m[2]) if m[2] else -1
            try:
                op, ty, d, s, more = self.encode(m[3], operands)
            except (Unsupported, KeyError, AttributeError, IndexError) as error:
                raise Unsupported(f"{text}  ({error!r})") from error
            if op == "BRA":
                branches.append((len(self.instructions), more.pop("label")))
            start = len(self.pool)
            self.pool += d + s
            fields = dict(ty2=0, mod=0, vec=1, imm=0) | more
            self.instructions.append(
                (OP[op], TY[ty], fields["ty2"], fields["mod"], pred, int(bool(m[1])), start, len(d))
                + (start + len(d), len(s), fields["vec"], fields["imm"])
                + ((1 << 64) - 1 if used is None else used,)
            )
        code = np.array(self.instructions, INSTRUCTION)
        for at, label in branches:
            code["imm"][at] = labels[label]
        self.code = code

    def row(self, name: str, ty: str = "U64") -> int:
        """The row of a register, special register or constant."""
        if name == "_":
            return -1
        if re.match(r"%[a-z]+\d+$|%(tid|ctaid|nctaid|ntid)\.[xyz]$|%laneid$", name) or (
            name in self.local or name in self.names
        ):
            return self.rows.setdefault(name, len(self.rows))
        if name == "global_smem":
            value = 0
        elif m := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", name):
            value = int(m[1], 16)
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", name):
            value = int(name.rstrip("U"), 0) & ((1 << 64) - 1)
            bits = {"PRED": 1, "U16": 16, "S16": 16, "U32": 32, "S32": 32, "F32": 32}.get(ty, 64)
            value &= (1 << bits) - 1
        else:
            raise Unsupported(f"operand {name}")
        row = self.rows.setdefault(f"#{value}", len(self.rows))
        self.constants[row] = value
        return row

    def place(self, operand: str) -> list[int]:
        m = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not m:
            raise Unsupported(operand)
        return [self.row(m[1]), self.row(m[2] or "0")]

    def vector(self, operand: str, ty: str = "U64") -> list[int]:
        return [self.row(x.strip(), ty) for x in operand.strip("{} ").split(",")]

    def encode(self, name: str, o: list[str]):
        """Operation, type, destination rows, source rows, further fields."""
        part = name.split(".")
        base, mods, t = part[0], part[1:-1], part[-1]
        ftz = 1 if "ftz" in mods else 0
        mods = [x for x in mods if x != "ftz"]

        def args(ty: str, first: int = 1) -> list[int]:
            return [self.row(x, ty) for x in o[first:]]

        def only(*allowed: str) -> None:
            if set(mods) - set(allowed):
                raise Unsupported(f"modifiers {mods}")

        if name in ("ret", "exit"):
            return "RET", "U32", [], [], {}
        if name in ("bra", "bra.uni"):
            return "BRA", "U32", [], [], {"label": o[0]}
        if name in ("bar.sync", "barrier.sync", "barrier.cta.sync") and o == ["0"]:
            return "BAR", "U32", [], [], {}
        if name == "bar.warp.sync":
            return "WARPSYNC", "U32", [], [self.row(o[0], "U32")], {}
        if name == "cp.async.commit_group":
            return "CPCOMMIT", "U32", [], [], {}
        if name == "cp.async.wait_group":
            return "CPWAIT", "U32", [], [], {"imm": int(o[0])}
        if name == "cp.async.wait_all":
            return "CPWAIT", "U32", [], [], {"imm": 0}
        if re.fullmatch(r"cp\.async\.c[ag]\.shared\.global(\.L2::\w+)?", name):
            size = int(o[2], 0)
            s = self.place(o[0]) + self.place(o[1]) + [self.row(x, "U32") for x in o[3:4]]
            return "CPASYNC", "U32", [], s, {"imm": size}
        if name == "fence.proxy.async.shared::cta":
            return "PROXYFENCE", "U32", [], [], {}
        if re.fullmatch(r"wgmma\.(fence|commit_group|wait_group)\.sync\.aligned", name):
            return "NOP", "U32", [], [], {}
        if m := re.fullmatch(
            r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(::cta)?\.b16", name
        ):
            more = {"vec": int(m[2]), "mod": 64 if m[3] else 0}
            if m[1] == "ld":
                return "LDMATRIX", "U32", self.vector(o[0]), self.place(o[1]), more
            return "STMATRIX", "U32", [], self.place(o[0]) + self.vector(o[1]), more
        if name == "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32":
            return "MMA_TF32", "F32", self.vector(o[0]), sum(map(self.vector, o[1:]), []), {}
        if name == "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64":
            return "MMA_F64", "F64", self.vector(o[0]), sum(map(self.vector, o[1:]), []), {}
        if m := re.fullmatch(
            r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k8\.f32\.tf32\.tf32", name
        ):
            if o[4:] != ["1", "1"]:
                raise Unsupported(f"scales {o[4:]}")
            d = self.vector(o[0])
            s = d + self.vector(o[1]) + [self.row(o[2]), self.row(o[3], "PRED")]
            return "WGMMA", "F32", d, s, {"vec": int(m[1]), "imm": int(o[1].startswith("{"))}
        if base == "shfl":
            if part[1] != "sync" or t != "b32" or o[3:] != ["31", "-1"] or "|" in o[0]:
                raise Unsupported("shfl")
            way = ["bfly", "idx", "down"].index(part[2])
            return (
                "SHFL",
                "U32",
                [self.row(o[0])],
                [self.row(x, "U32") for x in o[1:3]],
                {"imm": way},
            )
        if m := re.fullmatch(r"redux\.sync\.(add|min|max)(\.NaN)?\.([usf]32)", name):
            s = [self.row(x, "U32") for x in o[1:]]
            more = {"imm": ["add", "min", "max"].index(m[1]), "mod": 8 if m[2] else 0}
            return "REDUX", number_type(m[3]), [self.row(o[0])], s, more
        if m := re.fullmatch(r"fma\.rn\.f32\.(b?f16)", name):
            s = [self.row(x, "U16") for x in o[1:3]] + [self.row(o[3], "F32")]
            return "FMAMIXED", "F32", [self.row(o[0])], s, {"ty2": TY[m[1].upper()]}
        if base in ("ld", "st"):
            space = mods[0].split("::")[0]
            vec = next((int(x[1]) for x in mods[1:] if x in ("v2", "v4", "v8")), 1)
            if [x for x in mods[1:] if x not in ("v2", "v4", "v8") and not x.startswith("L1::")]:
                raise Unsupported(f"modifiers {mods}")
            ty = number_type(t)
            if space == "param":
                return "MOV", ty, [self.row(o[0])], [self.row(o[1].strip("[] "))], {}
            if space not in ("global", "shared"):
                raise Unsupported(space)
            more = {"imm": int(ty[1:]) // 8, "vec": vec, "mod": 32 if space == "global" else 0}
            if base == "ld":
                return "LD", ty, self.vector(o[0]), self.place(o[1]), more
            return "ST", ty, [], self.place(o[0]) + self.vector(o[1], ty), more
        if base == "cvt":
            to, source = part[-2], part[-1]
            rest = set(mods[:-1])
            if rest - {"rn", "rzi", "rni"} or {"s8", "u8", "b8"} & {to, source}:
                raise Unsupported(f"modifiers {mods}")
            if to in ("bf16x2", "f16x2"):
                return (
                    "CVT",
                    to.upper(),
                    [self.row(o[0])],
                    args("F32"),
                    {"ty2": TY["F32"], "mod": ftz},
                )
            more = {"ty2": TY[number_type(source)], "mod": ftz | (16 if "rzi" in rest else 0)}
            return "CVT", number_type(to), [self.row(o[0])], args(number_type(source)), more
        if base == "setp":
            only(*CMP, "lo", "ls", "hi", "hs")
            ty, how = number_type(t), mods[0]
            how = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(how, how)
            if len(mods) != 1 or "|" in o[0]:
                raise Unsupported("setp")
            return "SETP", ty, [self.row(o[0])], args(ty), {"imm": CMP.index(how), "mod": ftz}
        if base == "mov":
            only()
            ty = number_type(t)
            if o[0].startswith("{"):
                d = self.vector(o[0])
                return "UNPACK", ty, d, [self.row(o[1])], {"imm": int(ty[1:]) // len(d)}
            if o[1].startswith("{"):
                s = self.vector(o[1])
                return "PACK", ty, [self.row(o[0])], s, {"imm": int(ty[1:]) // len(s)}
            return "MOV", ty, [self.row(o[0])], [self.row(o[1], ty)], {}
        ty = number_type(t)
        d = [self.row(o[0])]
        if base == "selp":
            only()
            return "SELP", ty, d, [self.row(o[1], ty), self.row(o[2], ty), self.row(o[3])], {}
        if base in ("mul", "mad") and "wide" in mods:
            only("wide")
            wide = {"U32": "U64", "S32": "U64", "U16": "U32", "S16": "U32"}[ty]
            s = [self.row(x, ty) for x in o[1:3]] + [self.row(x, wide) for x in o[3:]]
            return ("MULWIDE" if base == "mul" else "MADWIDE"), ty, d, s, {}
        if base == "mul" and "hi" in mods:
            only("hi")
            return "MULHI", ty, d, args(ty), {}
        if base in ("add", "sub", "mul", "mad", "fma"):
            only(*(("rn",) if ty[0] == "F" else ("lo",)))
            if ty == "F16":
                raise Unsupported("arithmetic in f16")
            return {"mad": "FMA"}.get(base, base.upper()), ty, d, args(ty), {"mod": ftz}
        if base in ("shl", "shr"):
            only()
            ty = ty if base == "shr" else ty.replace("S", "U")
            return base.upper(), ty, d, [self.row(o[1], ty), self.row(o[2], "U32")], {}
        if base == "bfe":
            only()
            return (
                "BFE",
                ty,
                d,
                [self.row(o[1], ty), self.row(o[2], "U32"), self.row(o[3], "U32")],
                {},
            )
        if base == "div" and ty[0] == "F":
            only("full", "approx", "rn")
            kind = 2 if "approx" in mods else 4 if "full" in mods else 0
            return "DIV", ty, d, args(ty), {"mod": ftz | kind}
        if base in ("sqrt", "rcp", "rsqrt", "ex2", "lg2"):
            only("approx", "rn")
            if base in ("rsqrt", "ex2", "lg2") and ty != "F32":
                raise Unsupported(name)
            return base.upper(), ty, d, args(ty), {"mod": ftz | (2 if "approx" in mods else 0)}
        if base in ("min", "max"):
            only("NaN")
            return base.upper(), ty, d, args(ty), {"mod": ftz | (8 if "NaN" in mods else 0)}
        if base in ("div", "rem", "neg", "abs", "and", "or", "xor", "not", "prmt"):
            only()
            return base.upper(), ty, d, args(ty), {"mod": ftz}
        raise Unsupported(name)
