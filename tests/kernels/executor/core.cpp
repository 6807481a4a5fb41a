// Runs one launch of a PTX kernel on the CPU, warp by warp, and watches every access of memory.
// decode.py makes instructions of the PTX and names the enums OPS and TYPES; execute.py builds and
// calls this file, and says in words what each Kind is.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <vector>
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int32_t i32;
typedef int64_t i64;
enum Op { OPS };
enum Ty { TYPES };
enum Cmp { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NAN_ };
enum Kind {
  OOB_GLOBAL,
  OOB_SHARED,
  MISALIGNED,
  UNINIT_SHARED,
  RACE_SHARED,
  RACE_GLOBAL,
  RACE_CTA,
  ASYNC_SHARED,
  DIVERGED_SYNC,
  DEADLOCK,
  LIMIT,
  LANE_SHARED,
  LANE_GLOBAL,
  SAME_SHARED,
  SAME_GLOBAL,
  SAME_CTA,
  UNWAITED,
  PROXY_FENCE,
  LANES_DISAGREE
};
struct Ins {
  i32 op, ty, ty2, mod, pred, neg, d, nd, s, ns, vec, imm;
  u64 used;
};
struct Fault {
  i32 kind, ins, cta, warp, lane, other;
  i64 addr, count;
};
struct Shadow {  // of one byte
  // epoch of the last write and of the last reads, warps that read, convergence count and
  // instruction of the write, and the step that wrote
  u32 wep, rep, rmask, wsync, wins;
  u64 wstep;
  i32 wcta, rcta;  // last CTA that wrote, last that read, or -1
  u16 wwarp;
  u8 wlane, init, async, rmulti, proxy, pad;
};
struct Async {
  i32 lane;
  u32 to;
  u32 n;
  u8 data[16];
};
struct Warp {
  int id = 0, pc = 0;
  u32 active = 0;
  bool uniform = true, waiting = false;
  int pcs[32];
  u64* R = nullptr;
  u32 sync = 0;
  std::vector<Async> pending;
  std::deque<std::vector<Async>> groups;
};
struct Job {
  const Ins* ins;
  i64 n_ins;
  const i32* pool;
  i64 n_rows;
  const i32* const_rows;
  const u64* const_vals;
  i64 n_const;
  i64 threads, gx, gy, gz;
  u8* arena;
  u8* ok;
  u64 arena_size, base;
  i64 shared;
  u64 limit;
  const i32* special;  // rows of tid.x ctaid.xyz nctaid.xyz ntid.x laneid, or -1
  Fault* out;
  i64 max_out;
};
template <class T>
static inline T get(u64 v) {
  T t;
  memcpy(&t, &v, sizeof t);
  return t;
}
template <class T>
static inline u64 put(T t) {
  u64 v = 0;
  memcpy(&v, &t, sizeof t);
  return v;
}
static inline float flush(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.f, x) : x; }
static float half_to_float(u16 h) {
  _Float16 x;
  memcpy(&x, &h, 2);
  return (float)x;
}
static u16 float_to_half(float f) {
  _Float16 x = (_Float16)f;
  u16 h;
  memcpy(&h, &x, 2);
  return h;
}
static float bf_to_float(u16 h) { return get<float>((u64)h << 16); }
static u16 float_to_bf(float f) {
  u32 u = (u32)put(f);
  if (f != f) return 0x7fff;
  return (u16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static float tf32(float x) {
  return get<float>((u32)put(x) & 0xffffe000u);
}  // the tensor core drops 13 bits

struct Machine {
  const Job& J;
  std::vector<Shadow> gs, ss;
  std::vector<u8> smem;
  std::map<std::pair<int, int>, Fault> faults;
  std::vector<u64> regs;
  std::vector<Warp> warps;
  u32 epoch = 0, syncs = 0;
  int cta = 0;
  u64 steps = 0;
  bool stop = false;
  Machine(const Job& j) : J(j) {
    Shadow z;
    memset(&z, 0, sizeof z);
    z.wcta = z.rcta = -1;
    z.wins = ~0u;
    gs.assign(J.arena_size, z);
    ss.assign(J.shared, z);
    smem.assign(J.shared, 0);
    int nw = (J.threads + 31) / 32;
    warps.resize(nw);
    regs.assign((u64)nw * J.n_rows * 32, 0xFFFFFFFFFFFFFFFFull);
    for (int w = 0; w < nw; w++) {
      warps[w].id = w;
      warps[w].R = regs.data() + (u64)w * J.n_rows * 32;
    }
  }
  void fault(int kind, int ins, const Warp& w, int lane, i64 addr, int other = -1) {
    auto& f = faults[{kind, ins}];
    if (!f.count) f = Fault{kind, ins, cta, w.id, lane, other, addr, 0};
    f.count++;
  }
  // ---- memory ----
  bool where_global(u64 a, u32 n, int pc, Warp& w, int l, u64& i) {
    i = a - J.base;
    if (a % n) {
      fault(MISALIGNED, pc, w, l, a);
      return false;
    }
    bool in = a >= J.base && i + n <= J.arena_size;
    for (u32 k = 0; in && k < n; k++) in = J.ok[i + k];
    if (!in) fault(OOB_GLOBAL, pc, w, l, a);
    return in;
  }
  bool where_shared(u64 a, u32 n, int pc, Warp& w, int l) {
    if (a % n) {
      fault(MISALIGNED, pc, w, l, a);
      return false;
    }
    if (a + n > (u64)J.shared) {
      fault(OOB_SHARED, pc, w, l, a);
      return false;
    }
    return true;
  }
  void saw_read(Shadow& s, bool global, int pc, Warp& w, int l,
                u64 a) {  // whether another warp or CTA may have written it
    if (!global) {
      if (s.async)
        fault(ASYNC_SHARED, pc, w, l, a, s.wins);
      else if (!s.init)
        fault(UNINIT_SHARED, pc, w, l, a);
    } else if (s.wcta >= 0 && s.wcta != cta) {
      fault(RACE_CTA, pc, w, l, a, s.wins);
    }
    if (s.wcta == cta && s.wep == epoch) {
      if (s.wwarp != w.id) {
        fault(global ? RACE_GLOBAL : RACE_SHARED, pc, w, l, a, s.wins);
      } else if (s.wlane != l && s.wsync == w.sync)
        fault(global ? LANE_GLOBAL : LANE_SHARED, pc, w, l, a, s.wins);
    }
    if (s.rcta != cta) {
      if (s.rcta >= 0) s.rmulti = 1;
      s.rcta = cta;
      s.rep = 0;
    }
    if (s.rep != epoch) {
      s.rep = epoch;
      s.rmask = 0;
    }
    s.rmask |= 1u << w.id;
  }
  void saw_write(Shadow& s, bool global, int pc, Warp& w, int l, u64 a, bool same) {
    if (!global && s.async) fault(ASYNC_SHARED, pc, w, l, a, s.wins);
    if (global && ((s.wcta >= 0 && s.wcta != cta) || (s.rcta >= 0 && s.rcta != cta) || s.rmulti))
      fault(same ? SAME_CTA : RACE_CTA, pc, w, l, a, s.wins);
    bool race = s.wcta == cta && s.wep == epoch && s.wwarp != w.id;
    race |= s.rcta == cta && s.rep == epoch && (s.rmask & ~(1u << w.id));
    if (race)
      fault(global ? (same ? SAME_GLOBAL : RACE_GLOBAL) : (same ? SAME_SHARED : RACE_SHARED), pc, w,
            l, a, s.wins);
    else if (!same && s.wcta == cta && s.wep == epoch && s.wlane != l && s.wsync == w.sync &&
             s.wins != pc)
      fault(global ? LANE_GLOBAL : LANE_SHARED, pc, w, l, a, s.wins);
    s.wcta = cta;
    s.wep = epoch;
    s.wwarp = w.id;
    s.wlane = l;
    s.wsync = w.sync;
    s.init = 1;
    s.proxy = 1;
    s.wins = pc;
  }
  void load(bool global, u64 a, u32 n, u8* to, int pc, Warp& w, int l, u64 used = ~0ull) {
    memset(to, 0, n);
    u64 i = a;
    if (global ? !where_global(a, n, pc, w, l, i) : !where_shared(a, n, pc, w, l)) return;
    memcpy(to, (global ? J.arena : smem.data()) + i, n);
    for (u32 k = 0; k < n; k++)
      if (used >> k & 1) saw_read((global ? gs : ss)[i + k], global, pc, w, l, a + k);
  }
  void store(bool global, u64 a, u32 n, const u8* from, int pc, Warp& w, int l, u32 size = 4) {
    u64 i = a;
    if (global ? !where_global(a, n, pc, w, l, i) : !where_shared(a, n, pc, w, l)) return;
    u8* to = (global ? J.arena : smem.data()) + i;
    Shadow* sh =
        &(global ? gs : ss)[i];  // of the lanes of one instruction the first to come here wins
    for (u32 k = 0, e = size < 4 ? 4 : size; k + e <= n; k += e)
      if (sh[k].wstep == steps && memcmp(to + k, from + k, e))
        fault(LANES_DISAGREE, pc, w, l, a + k, pc);
    for (u32 k = 0; k < n; k++) {
      if (sh[k].wstep == steps) continue;
      saw_write(sh[k], global, pc, w, l, a + k, to[k] == from[k]);
      sh[k].wstep = steps;
      to[k] = from[k];
    }
  }
  void finish(Warp& w, std::vector<Async>& group, int pc) {
    for (auto& c : group)
      for (u32 k = 0; k < c.n; k++) {
        Shadow& s = ss[c.to + k];
        s.async = 0;
        smem[c.to + k] = c.data[k];
        s.wcta = cta;
        s.wep = epoch;
        s.wwarp = w.id;
        s.wlane = c.lane;
        s.wsync = w.sync;
        s.init = 1;
        s.proxy = 0;
        s.wins = pc;  // Triton fences what registers wrote, not what cp.async did
      }
  }
  // ---- one CTA ----
  void run_cta(int x, int y, int z) {
    memset(regs.data(), 0xFF, regs.size() * 8);
    epoch++;
    Shadow zero;
    memset(&zero, 0, sizeof zero);
    zero.wcta = zero.rcta = -1;
    zero.wins = ~0u;
    std::fill(ss.begin(), ss.end(), zero);
    memset(smem.data(), 0xFF, smem.size());
    for (auto& w : warps) {
      w.pc = 0;
      w.uniform = true;
      w.waiting = false;
      w.pending.clear();
      w.groups.clear();
      w.sync = ++syncs;
      int left = J.threads - w.id * 32;
      w.active = left >= 32 ? ~0u : (1u << left) - 1;
      for (i64 k = 0; k < J.n_const; k++)
        for (int l = 0; l < 32; l++) w.R[(u64)J.const_rows[k] * 32 + l] = J.const_vals[k];
      u64 v[9] = {0, (u64)x, (u64)y, (u64)z, (u64)J.gx, (u64)J.gy, (u64)J.gz, (u64)J.threads, 0};
      for (int k = 0; k < 9; k++)
        if (J.special[k] >= 0)
          for (int l = 0; l < 32; l++)
            w.R[(u64)J.special[k] * 32 + l] = k == 0 ? w.id * 32 + l : k == 8 ? l : v[k];
    }
    int nw = warps.size();
    while (!stop) {
      for (int k = 0; k < nw && !stop; k++) {
        if (warps[k].active && !warps[k].waiting) run_warp(warps[k]);
      }
      int waiting = 0, alive = 0;
      for (auto& w : warps) {
        waiting += w.waiting;
        alive += w.active != 0;
      }
      if (!alive) break;
      if (waiting != alive || alive != nw) {
        fault(DEADLOCK, warps[0].pc, warps[0], 0, 0);
        stop = true;
        break;
      }
      epoch++;
      for (auto& w : warps) {
        w.waiting = false;
        w.sync = ++syncs;
      }
    }
    for (auto& w : warps) {
      bool left = !w.pending.empty();
      for (auto& g : w.groups) left |= !g.empty();
      if (left) fault(UNWAITED, 0, w, 0, 0);
    }
  }
  static bool collective(int op) {
    return op == BAR || op == WARPSYNC || op == SHFL || op == REDUX || op == LDMATRIX ||
           op == STMATRIX || op == MMA_TF32 || op == MMA_F64 || op == WGMMA;
  }
  void run_warp(Warp& w) {
    while (w.active) {
      u32 m = w.active;
      int pc = w.pc;
      if (!w.uniform) {
        pc = 1 << 30;
        m = 0;
        // lanes that came to an instruction of the whole warp wait for the others
        for (int l = 0; l < 32; l++)
          if (w.active >> l & 1 && w.pcs[l] < pc && !collective(J.ins[w.pcs[l]].op)) pc = w.pcs[l];
        if (pc == 1 << 30) {
          for (int l = 0; l < 32; l++)
            if (w.active >> l & 1) pc = w.pcs[l];
          fault(DIVERGED_SYNC, pc, w, 0, 0);
          stop = true;
          return;
        }
        for (int l = 0; l < 32; l++)
          if (w.active >> l & 1 && w.pcs[l] == pc) m |= 1u << l;
      }
      if (++steps > J.limit) {
        fault(LIMIT, pc, w, 0, 0);
        stop = true;
        return;
      }
      const Ins& I = J.ins[pc];
      u32 here = m;
      if (I.pred >= 0) {
        const u64* P = w.R + (u64)I.pred * 32;
        u32 p = 0;
        for (int l = 0; l < 32; l++)
          if (((P[l] & 1) != 0) != (I.neg != 0)) p |= 1u << l;
        m &= p;
      }
      if (I.op == BAR && m) {
        if (m != w.active || !w.uniform) {
          fault(DIVERGED_SYNC, pc, w, 0, 0);
          stop = true;
          return;
        }
        w.pc = pc + 1;
        w.waiting = true;
        return;
      }
      int target = pc + 1;
      u32 gone = 0, taken = 0;
      if (I.op == BRA) {
        taken = m;
        target = I.imm;
      } else if (I.op == RET)
        gone = m;
      else if (m)
        exec(w, I, m, pc);
      if (stop) return;
      if (w.uniform && (!taken || taken == here) && !gone) {
        w.pc = taken ? target : pc + 1;
        continue;
      }
      if (w.uniform && gone == w.active) {
        w.active = 0;
        return;
      }
      if (w.uniform) {
        for (int l = 0; l < 32; l++) w.pcs[l] = pc;
        w.uniform = false;
      }
      for (int l = 0; l < 32; l++)
        if (here >> l & 1) w.pcs[l] = taken >> l & 1 ? target : pc + 1;
      w.active &= ~gone;
      if (!w.active) return;
      int first = -1;
      bool all = true;
      for (int l = 0; l < 32; l++)
        if (w.active >> l & 1) {
          if (first < 0) first = w.pcs[l];
          all &= w.pcs[l] == first;
        }
      if (all) {
        w.uniform = true;
        w.pc = first;
      }
    }
  }
#define LANES                  \
  for (int l = 0; l < 32; l++) \
    if (m >> l & 1)
#define UN(T, E)          \
  {                       \
    LANES {               \
      T a = get<T>(A[l]); \
      D[l] = put<T>(E);   \
    }                     \
    return;               \
  }
#define BIN(T, E)                           \
  {                                         \
    LANES {                                 \
      T a = get<T>(A[l]), b = get<T>(B[l]); \
      D[l] = put<T>(E);                     \
    }                                       \
    return;                                 \
  }
#define TRI(T, E)                                             \
  {                                                           \
    LANES {                                                   \
      T a = get<T>(A[l]), b = get<T>(B[l]), c = get<T>(C[l]); \
      D[l] = put<T>(E);                                       \
    }                                                         \
    return;                                                   \
  }
#define FUN(E)                        \
  {                                   \
    LANES {                           \
      float a = in(get<float>(A[l])); \
      D[l] = put<float>(in(E));       \
    }                                 \
    return;                           \
  }
#define FBIN(E)                                                 \
  {                                                             \
    LANES {                                                     \
      float a = in(get<float>(A[l])), b = in(get<float>(B[l])); \
      D[l] = put<float>(in(E));                                 \
    }                                                           \
    return;                                                     \
  }
#define FTRI(E)                                                                           \
  {                                                                                       \
    LANES {                                                                               \
      float a = in(get<float>(A[l])), b = in(get<float>(B[l])), c = in(get<float>(C[l])); \
      D[l] = put<float>(in(E));                                                           \
    }                                                                                     \
    return;                                                                               \
  }
#define INTS(M, E)               \
  switch (I.ty) {                \
    case U16:                    \
    case S16:                    \
    M(u16, E) case U32:          \
    case S32:                    \
    M(u32, E) case U64:          \
    case S64:                    \
      M(u64, E) default : break; \
  }                              \
  break;
  template <class T>
  static bool compare(int c, T a, T b) {
    bool un = a != a || b != b;
    switch (c) {
      case EQ:
        return a == b;
      case NE:
        return !un && a != b;
      case LT:
        return a < b;
      case LE:
        return a <= b;
      case GT:
        return a > b;
      case GE:
        return a >= b;
      case EQU:
        return un || a == b;
      case NEU:
        return un || a != b;
      case LTU:
        return un || a < b;
      case LEU:
        return un || a <= b;
      case GTU:
        return un || a > b;
      case GEU:
        return un || a >= b;
      case NUM:
        return !un;
      default:
        return un;
    }
  }
#define PAIR(E)                                                                       \
  {                                                                                   \
    LANES {                                                                           \
      float r[2];                                                                     \
      for (int h = 0; h < 2; h++) {                                                   \
        float a = in(get<float>(A[l] >> 32 * h)), b = in(get<float>(B[l] >> 32 * h)), \
              c = C ? in(get<float>(C[l] >> 32 * h)) : 0;                             \
        (void)c;                                                                      \
        r[h] = in(E);                                                                 \
      }                                                                               \
      D[l] = put<float>(r[0]) | put<float>(r[1]) << 32;                               \
    }                                                                                 \
    return;                                                                           \
  }
  void exec(Warp& w, const Ins& I, u32 m, int pc) {
    const i32 *d = J.pool + I.d, *s = J.pool + I.s;
    u64* R = w.R;
    auto row = [&](int r) { return R + (u64)r * 32; };
    u64* D = I.nd ? row(d[0]) : nullptr;
    const u64 *A = I.ns > 0 ? row(s[0]) : nullptr, *B = I.ns > 1 ? row(s[1]) : nullptr,
              *C = I.ns > 2 ? row(s[2]) : nullptr;
    bool ftz = I.mod & 1;
    auto in = [&](float x) { return ftz ? flush(x) : x; };
    switch (I.op) {
      case MOV:
        LANES D[l] = A[l];
        return;
      case PACK:
        LANES {
          u64 v = 0;
          for (int k = 0; k < I.ns; k++)
            v |= (row(s[k])[l] & (I.imm == 64 ? ~0ull : (1ull << I.imm) - 1)) << (k * I.imm);
          D[l] = v;
        }
        return;
      case UNPACK:
        LANES {
          u64 v = A[l];
          for (int k = 0; k < I.nd; k++)
            if (d[k] >= 0) row(d[k])[l] = (v >> (k * I.imm)) & ((1ull << I.imm) - 1);
        }
        return;
      case ADD:
        if (I.ty == F32X2) PAIR(a + b)
        if (I.ty == F32) FBIN(a + b) if (I.ty == F64) BIN(double, a + b) INTS(BIN, a + b) case SUB:
          if (I.ty == F32X2) PAIR(a - b)
        if (I.ty == F32) FBIN(a - b) if (I.ty == F64) BIN(double, a - b) INTS(BIN, a - b) case MUL:
          if (I.ty == F32X2) PAIR(a * b)
        if (I.ty == F32) FBIN(a * b) if (I.ty == F64) BIN(double, a* b) INTS(BIN, a * b) case FMA:
          if (I.ty == F32X2) PAIR(fmaf(a, b, c))
        if (I.ty == F32) FTRI(fmaf(a, b, c)) if (I.ty == F64) TRI(double, fma(a, b, c))
            INTS(TRI, a * b + c) case MULHI:
          if (I.ty == U32) BIN(u32, (u32)((u64)a * b >> 32))
          if (I.ty == S32) BIN(i32, (i32)((i64)a * b >> 32)) if (I.ty == U64)
              BIN(u64, (u64)((unsigned __int128)a * b >> 64)) if (I.ty == S64)
                  BIN(i64, (i64)((__int128)a * b >> 64)) break;
      case MULWIDE:
      case MADWIDE:
        LANES {
          u64 c = I.op == MADWIDE ? C[l] : 0;
          D[l] = I.ty == S32   ? (u64)((i64)get<i32>(A[l]) * get<i32>(B[l])) + c
                 : I.ty == U32 ? (u64)get<u32>(A[l]) * get<u32>(B[l]) + c
                 : I.ty == S16 ? (u64)(u32)((i32)get<int16_t>(A[l]) * get<int16_t>(B[l]) + (i32)c)
                               : (u64)(u32)((u32)get<u16>(A[l]) * get<u16>(B[l]) + (u32)c);
        }
        return;
      case DIV:
        switch (I.ty) {
          case F32:
            if (I.mod & 2)
              FBIN(fabsf(b) > 8.507059e37f && std::isfinite(b) ? (std::isinf(a) ? NAN : a / b * 0)
                                                               : (a / b))
            if (I.mod & 4) FBIN((a / b)) FBIN(a / b) case F64:
            BIN(double, a / b) case S32:
            BIN(i32, b ? a / b : -1) case U32:
            BIN(u32, b ? a / b : ~0u) case S64:
            BIN(i64, b ? a / b : -1) case U64:
              BIN(u64, b ? a / b : ~0ull)
        }
        break;
      case REM:
        switch (I.ty) {
          case S32:
          BIN(i32, b ? a % b : a) case U32:
          BIN(u32, b ? a % b : a) case S64:
          BIN(i64, b ? a % b : a) case U64:
            BIN(u64, b ? a % b : a)
        }
        break;
      case MIN:
      case MAX: {
        bool hi = I.op == MAX;
        bool nan = I.mod & 8;
        switch (I.ty) {
          case F32:
          FBIN(nan && (a != a || b != b) ? NAN : hi ? fmaxf(a, b) : fminf(a, b)) case F64:
            BIN(double, hi ? fmax(a, b) : fmin(a, b))
          case S32:
          BIN(i32, hi == (a > b) ? a : b) case U32:
          BIN(u32, hi == (a > b) ? a : b) case S64:
          BIN(i64, hi == (a > b) ? a : b) case U64:
            BIN(u64, hi == (a > b) ? a : b)
        }
        break;
      }
      case NEG:
        switch (I.ty) {
          case F32:
          FUN(-a) case F64:
          UN(double, -a) case S32:
          UN(u32, 0 - a) case S64:
            UN(u64, 0 - a)
        }
        break;
      case ABS:
        switch (I.ty) {
          case F32:
          FUN(fabsf(a)) case F64:
          UN(double, fabs(a)) case S32:
            UN(i32, a < 0 ? -a : a)
        }
        break;
      case SQRT:
        if (I.ty == F64) UN(double, sqrt(a)) if (I.mod & 2) FUN((sqrtf(a))) FUN(sqrtf(a)) case EX2:
          FUN(((float)exp2((double)a)))
        case LG2:
          FUN(((float)log2((double)a)))
        case RCP:
          if (I.ty == F64) UN(double, 1 / a) if (I.mod & 2) FUN((1 / a)) FUN(1 / a) case RSQRT:
            FUN(((float)(1 / sqrt((double)a))))
          case AND:
            LANES D[l] = A[l] & B[l];
            return;
        case OR:
          LANES D[l] = A[l] | B[l];
          return;
      case XOR:
        LANES D[l] = A[l] ^ B[l];
        return;
      case NOT:
        LANES D[l] = ~A[l] & (I.ty == PRED  ? 1
                              : I.ty == U16 ? 0xFFFF
                              : I.ty == U32 ? 0xFFFFFFFFull
                                            : ~0ull);
        return;
      case SHL:
        switch (I.ty) {
          case U16:
            LANES {
              u32 n = B[l];
              D[l] = n > 15 ? 0 : (u16)(A[l] << n);
            }
            return;
          case U32:
            LANES {
              u32 n = B[l];
              D[l] = n > 31 ? 0 : (u32)((u32)A[l] << n);
            }
            return;
          case U64:
            LANES {
              u32 n = B[l];
              D[l] = n > 63 ? 0 : A[l] << n;
            }
            return;
        }
        break;
      case SHR:
        switch (I.ty) {
          case U16:
            LANES {
              u32 n = B[l];
              D[l] = n > 15 ? 0 : (u16)A[l] >> n;
            }
            return;
          case U32:
            LANES {
              u32 n = B[l];
              D[l] = n > 31 ? 0 : (u32)A[l] >> n;
            }
            return;
          case U64:
            LANES {
              u32 n = B[l];
              D[l] = n > 63 ? 0 : A[l] >> n;
            }
            return;
          case S32:
            LANES {
              u32 n = B[l];
              D[l] = put<i32>(get<i32>(A[l]) >> (n > 31 ? 31 : n));
            }
            return;
          case S64:
            LANES {
              u32 n = B[l];
              D[l] = put<i64>(get<i64>(A[l]) >> (n > 63 ? 63 : n));
            }
            return;
        }
        break;
      case BFE:
        LANES {
          int bits = I.ty == U64 || I.ty == S64 ? 64 : 32;
          u32 pos = B[l] & 255, len = C[l] & 255;
          u64 v = 0;
          bool sg = I.ty == S32 || I.ty == S64;
          u64 a = A[l];
          u32 msb = bits - 1;
          u32 last = pos + len - 1 < msb ? pos + len - 1 : msb;
          u64 sbit = !sg || len == 0 ? 0 : a >> last & 1;
          for (u32 k = 0; k < (u32)bits; k++)
            v |= (k < len && pos + k <= msb ? a >> (pos + k) & 1 : sbit) << k;
          D[l] = v;
        }
        return;
      case PRMT:
        LANES {
          u64 v = (u32)A[l] | B[l] << 32;
          u32 sel = C[l];
          u32 r = 0;
          for (int k = 0; k < 4; k++) {
            u32 q = sel >> (4 * k) & 15;
            u32 byte = v >> (8 * (q & 7)) & 255;
            if (q & 8) byte = byte & 128 ? 255 : 0;
            r |= byte << (8 * k);
          }
          D[l] = r;
        }
        return;
      case SETP:
        switch (I.ty) {
#define CMP(T)                                                \
  LANES D[l] = compare<T>(I.imm, get<T>(A[l]), get<T>(B[l])); \
  return;
          case F32:
            LANES D[l] = compare<float>(I.imm, in(get<float>(A[l])), in(get<float>(B[l])));
            return;
          case F64:
          CMP(double) case S16:
          CMP(int16_t) case U16:
          CMP(u16) case S32:
          CMP(i32) case U32:
          CMP(u32) case S64:
          CMP(i64) case U64:
            CMP(u64)
        }
        break;
      case SELP:
        LANES D[l] = C[l] & 1 ? A[l] : B[l];
        return;
      case CVT:
        LANES {  // ty: to, ty2: from, mod 16: toward zero
          u64 v = A[l];
          int to = I.ty, from = I.ty2;
          bool ff = from == F32 || from == F64 || from == F16 || from == BF16;
          if (to == BF16X2 || to == F16X2) {
            float hi = get<float>(A[l]), lo = get<float>(B[l]);
            D[l] = to == F16X2 ? (u32)float_to_half(hi) << 16 | float_to_half(lo)
                               : (u32)float_to_bf(hi) << 16 | float_to_bf(lo);
            continue;
          }
          if (ff) {
            double x = from == F64   ? get<double>(v)
                       : from == F32 ? in(get<float>(v))
                       : from == F16 ? half_to_float(v)
                                     : bf_to_float(v);
            switch (to) {
              case F64:
                D[l] = put<double>(x);
                break;
              case F32:
                D[l] = put<float>((float)x);
                break;
              case F16:
                D[l] = float_to_half((float)x);
                break;
              case BF16:
                D[l] = float_to_bf((float)x);
                break;
              case S32:
                D[l] = put<i32>((i32)(I.mod & 16 ? trunc(x) : nearbyint(x)));
                break;
              case U32:
                D[l] = put<u32>((u32)(I.mod & 16 ? trunc(x) : nearbyint(x)));
                break;
              case S64:
                D[l] = put<i64>((i64)(I.mod & 16 ? trunc(x) : nearbyint(x)));
                break;
              default:
                D[l] = (u64)x;
            }
          } else {
            i64 x = from == S16   ? (i64)get<int16_t>(v)
                    : from == S32 ? (i64)get<i32>(v)
                    : from == U16 ? (i64)(u16)v
                    : from == U32 ? (i64)(u32)v
                                  : (i64)v;
            switch (to) {
              case F32:
                D[l] = put<float>(from == U64 ? (float)(u64)x : (float)x);
                break;
              case F64:
                D[l] = put<double>(from == U64 ? (double)(u64)x : (double)x);
                break;
              case U16:
              case S16:
                D[l] = (u16)x;
                break;
              case U32:
              case S32:
                D[l] = (u32)x;
                break;
              default:
                D[l] = x;
            }
          }
        }
        return;
      case LD: {
        bool g = I.mod & 32;
        int b = I.imm;
        u8 buf[64];
        LANES {
          u64 a = g ? A[l] + B[l] : (u32)(A[l] + B[l]);
          load(g, a, b * I.vec, buf, pc, w, l, I.used);
          for (int k = 0; k < I.nd; k++)
            if (d[k] >= 0) {
              u64 v = 0;
              memcpy(&v, buf + k * b, b);
              if (I.ty == S32) v = (u64)(i64)(i32)v;
              row(d[k])[l] = v;
            }
        }
        return;
      }
      case ST: {
        bool g = I.mod & 32;
        int b = I.imm;
        u8 buf[64];
        for (int q = 0; q < 32; q++) {
          int l = 31 - q;
          if (!(m >> l & 1)) continue;
          u64 a = g ? A[l] + B[l] : (u32)(A[l] + B[l]);
          for (int k = 0; k < I.vec; k++) memcpy(buf + k * b, &row(s[2 + k])[l], b);
          store(g, a, b * I.vec, buf, pc, w, l, b);
        }
        return;
      }
      case CPASYNC:
        LANES {  // to, offset, from, offset, source size
          Async c;
          c.lane = l;
          c.n = I.imm;
          c.to = (u32)(A[l] + B[l]);
          u64 from = C[l] + row(s[3])[l];
          u32 size = I.ns > 4 ? (u32)row(s[4])[l] : c.n;
          memset(c.data, 0, 16);
          if (size > c.n) size = c.n;
          if (size == c.n)
            load(true, from, size, c.data, pc, w, l);
          else if (size) {
            if (from % c.n) fault(MISALIGNED, pc, w, l, from);
            for (u32 k = 0; k < size; k++) load(true, from + k, 1, c.data + k, pc, w, l);
          }
          if (!where_shared(c.to, c.n, pc, w, l)) continue;
          for (u32 k = 0; k < c.n; k++) {
            Shadow& q = ss[c.to + k];
            if (q.async) fault(ASYNC_SHARED, pc, w, l, c.to + k);
            bool race = (q.wcta == cta && q.wep == epoch && q.wwarp != w.id) ||
                        (q.rcta == cta && q.rep == epoch && (q.rmask & ~(1u << w.id)));
            if (race) fault(RACE_SHARED, pc, w, l, c.to + k);
            q.async = 1;
          }
          w.pending.push_back(c);
        }
        return;
      case CPCOMMIT:
        w.groups.push_back(std::move(w.pending));
        w.pending.clear();
        return;
      case CPWAIT:
        while ((int)w.groups.size() > I.imm) {
          finish(w, w.groups.front(), pc);
          w.groups.pop_front();
        }
        return;
      case WARPSYNC:
        if (m != w.active || (u32)A[0] != ~0u) fault(DIVERGED_SYNC, pc, w, 0, 0);
        w.sync = ++syncs;
        return;
      case SHFL: {  // imm: 0 bfly, 1 idx, 2 down, 3 up
        if (m != ~0u) {
          fault(DIVERGED_SYNC, pc, w, 0, 0);
        }
        u64 t[32];
        for (int l = 0; l < 32; l++) t[l] = A[l];
        LANES {
          int k = (int)B[l] & 31, q = I.imm == 0   ? l ^ k
                                      : I.imm == 1 ? k
                                      : I.imm == 2 ? l + k
                                                   : l - k;
          if (q < 0 || q > 31) q = l;
          D[l] = (u32)t[q];
        }
        w.sync = ++syncs;
        return;
      }
      case REDUX: {  // imm: 0 add, 1 min, 2 max; mod 8: NaN wins
        if (m != ~0u) fault(DIVERGED_SYNC, pc, w, 0, 0);
        u64 t[32];
        LANES {
          u32 members = B[l];
          bool first = true;
          float x = 0;
          i64 y = 0;
          if (!(members >> l & 1)) fault(DIVERGED_SYNC, pc, w, l, 0);
          for (int k = 0; k < 32; k++)
            if (members >> k & 1) {
              if (I.ty == F32) {
                float v = get<float>(A[k]);
                x = first                             ? v
                    : I.mod & 8 && (v != v || x != x) ? NAN
                    : I.imm == 2                      ? fmaxf(x, v)
                                                      : fminf(x, v);
              } else {
                i64 v = I.ty == S32 ? (i64)get<i32>(A[k]) : (i64)get<u32>(A[k]);
                y = first ? v : I.imm == 0 ? y + v : I.imm == 2 ? (v > y ? v : y) : (v < y ? v : y);
              }
              first = false;
            }
          t[l] = I.ty == F32 ? put<float>(x) : (u32)y;
        }
        LANES D[l] = t[l];
        w.sync = ++syncs;
        return;
      }
      case FMAMIXED:
        LANES {
          float a = I.ty2 == BF16 ? bf_to_float(A[l]) : half_to_float(A[l]),
                b = I.ty2 == BF16 ? bf_to_float(B[l]) : half_to_float(B[l]);
          D[l] = put<float>(fmaf(a, b, get<float>(C[l])));
        }
        return;
      case LDMATRIX:
      case STMATRIX: {  // vec: matrices, mod 64: transposed
        if (m != ~0u) fault(DIVERGED_SYNC, pc, w, 0, 0);
        for (int q = 0; q < I.vec; q++)
          for (int l = 0; l < 32; l++) {
            auto at = [&](int r) {
              int o = 8 * q + r;
              u64 a = (u32)(A[o] + B[o]);
              if (l == 0 && a % 16) fault(MISALIGNED, pc, w, o, a);
              return a;
            };
            if (I.op == LDMATRIX) {
              u32 v = 0;
              if (I.mod & 64) {
                u16 x, y;
                load(false, at(2 * (l % 4)) + 2 * (l / 4), 2, (u8*)&x, pc, w, l);
                load(false, at(2 * (l % 4) + 1) + 2 * (l / 4), 2, (u8*)&y, pc, w, l);
                v = x | (u32)y << 16;
              } else
                load(false, at(l / 4) + 4 * (l % 4), 4, (u8*)&v, pc, w, l);
              row(d[q])[l] = v;
            } else {
              u32 v = (u32)row(s[2 + q])[l];
              if (I.mod & 64) {
                u16 x = v, y = v >> 16;
                store(false, at(2 * (l % 4)) + 2 * (l / 4), 2, (u8*)&x, pc, w, l);
                store(false, at(2 * (l % 4) + 1) + 2 * (l / 4), 2, (u8*)&y, pc, w, l);
              } else
                store(false, at(l / 4) + 4 * (l % 4), 4, (u8*)&v, pc, w, l);
            }
          }
        return;
      }
      case MMA_TF32: {  // d 4; a 4, b 2, c 4
        if (m != ~0u) fault(DIVERGED_SYNC, pc, w, 0, 0);
        float a[16][8], b[8][8], c[16][8];
        for (int l = 0; l < 32; l++) {
          int g = l >> 2, t = l & 3;
          auto f = [&](int k) { return get<float>(row(s[k])[l]); };
          a[g][t] = tf32(f(0));
          a[g + 8][t] = tf32(f(1));
          a[g][t + 4] = tf32(f(2));
          a[g + 8][t + 4] = tf32(f(3));
          b[t][g] = tf32(f(4));
          b[t + 4][g] = tf32(f(5));
          c[g][2 * t] = f(6);
          c[g][2 * t + 1] = f(7);
          c[g + 8][2 * t] = f(8);
          c[g + 8][2 * t + 1] = f(9);
        }
        for (int l = 0; l < 32; l++)
          for (int q = 0; q < 4; q++) {
            int r = (l >> 2) + 8 * (q >> 1), n = 2 * (l & 3) + (q & 1);
            double v = c[r][n];
            for (int k = 0; k < 8; k++) v += (double)a[r][k] * b[k][n];
            row(d[q])[l] = put<float>((float)v);
          }
        return;
      }
      case MMA_F64: {
        if (m != ~0u) fault(DIVERGED_SYNC, pc, w, 0, 0);
        double a[8][4], b[4][8], c[8][8];
        for (int l = 0; l < 32; l++) {
          int g = l >> 2, t = l & 3;
          auto f = [&](int k) { return get<double>(row(s[k])[l]); };
          a[g][t] = f(0);
          b[t][g] = f(1);
          c[g][2 * t] = f(2);
          c[g][2 * t + 1] = f(3);
        }
        for (int l = 0; l < 32; l++)
          for (int q = 0; q < 2; q++) {
            int r = l >> 2, n = 2 * (l & 3) + q;
            double v = c[r][n];
            for (int k = 0; k < 4; k++) v = fma(a[r][k], b[k][n], v);
            row(d[q])[l] = put<double>(v);
          }
        return;
      }
      case WGMMA: {  // vec: N; imm 1: a from registers; s: accumulators, a, b, scale
        if (m != ~0u) fault(DIVERGED_SYNC, pc, w, 0, 0);
        int N = I.vec;
        const i32* t = s + I.nd;
        bool regs_a = I.imm;
        auto at = [&](u64 desc, int r, int k) {
          u32 start = (desc & 0x3fff) << 4, lead = (desc >> 16 & 0x3fff) << 4,
              stride = (desc >> 32 & 0x3fff) << 4;
          int sw = desc >> 62;
          if (!sw) return start + (r / 8) * stride + (k / 4) * lead + (r % 8) * 16 + (k % 4) * 4;
          u32 wide = sw == 1   ? 128
                     : sw == 2 ? 64
                               : 32,
              a = start + (r / 8) * stride + (r % 8) * wide + k * 4;
          return a ^ ((a >> 7 & (wide / 16 - 1)) << 4);
        };
        float a[16][8];
        std::vector<float> b(N * 8);
        auto fetch = [&](u64 desc, int r, int k, int l) {
          float x;
          u32 p = at(desc, r, k);
          load(false, p, 4, (u8*)&x, pc, w, l);
          if (p + 4 <= (u64)J.shared && ss[p].proxy == 1) fault(PROXY_FENCE, pc, w, l, p);
          return tf32(x);
        };
        if (regs_a)
          for (int l = 0; l < 32; l++) {
            int g = l >> 2, q = l & 3;
            auto f = [&](int k) { return tf32(get<float>(row(t[k])[l])); };
            a[g][q] = f(0);
            a[g + 8][q] = f(1);
            a[g][q + 4] = f(2);
            a[g + 8][q + 4] = f(3);
          }
        else
          for (int r = 0; r < 16; r++)
            for (int k = 0; k < 8; k++) a[r][k] = fetch(row(t[0])[0], 16 * (w.id % 4) + r, k, r);
        const i32* u = t + (regs_a ? 4 : 1);
        for (int n = 0; n < N; n++)
          for (int k = 0; k < 8; k++) b[n * 8 + k] = fetch(row(u[0])[0], n, k, n % 32);
        bool scale = row(u[1])[0] & 1;
        for (int l = 0; l < 32; l++)
          for (int q = 0; q < I.nd; q++) {
            int r = (l >> 2) + 8 * (q >> 1 & 1), n = (q >> 2) * 8 + 2 * (l & 3) + (q & 1);
            double v = scale ? get<float>(row(s[q])[l]) : 0;
            for (int k = 0; k < 8; k++) v += (double)a[r][k] * b[n * 8 + k];
            row(d[q])[l] = put<float>((float)v);
          }
        return;
      }
      case PROXYFENCE:  // what this warp wrote to shared memory becomes visible to the tensor cores
        for (auto& q : ss)
          if (q.proxy == 1 && q.wwarp == w.id) q.proxy = 2;
        return;
      case NOP:
        return;
      default:
        break;
    }
    fprintf(stderr, "executor: instruction %d (op %d type %d) is not implemented\n", pc, I.op,
            I.ty);
    stop = true;
    fault(LIMIT, pc, w, 0, -1);
  }
};
extern "C" i64 run(const Job* job) {
  Machine M(*job);
  const Job& J = *job;
  int n = 0;
  i64 ctas = J.gx * J.gy * J.gz;
  for (i64 c = 0; c < ctas && !M.stop; c++) {
    M.cta = c;
    M.run_cta(c % J.gx, c / J.gx % J.gy, c / J.gx / J.gy);
  }
  for (auto& f : M.faults)
    if (n < J.max_out) J.out[n++] = f.second;
  return n;
}
