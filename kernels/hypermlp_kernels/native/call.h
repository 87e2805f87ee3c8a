// What the caller passes: the C interface, one struct for every entry. Python's mirror of it is `abi.py`.
#pragma once
#include <cstdint>

#include "vectors.h"

namespace hypermlp {

enum Type : int64_t { REAL, BFLOAT16, FLOAT16 };

// PyTorch's threads: parallel runs fn(data) on so many at once, this one among them; null where it has none to lend
struct Team {
  void (*parallel)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);
  int64_t threads;
};

// [B, T, heads, width] with its distances in elements; a row of `width` lies side by side. data is null where there is
// none.
struct Stream {
  const void* data;
  int64_t batch, token, head;
};

// one sequence mixing: tables [heads, L] and [heads, L, rank], gate [B, T, heads, rank]; null where it has none
struct Mix {
  const real *diag, *down, *up;
  Stream gate;
  int64_t rank, identity;
};

// where its gradients go, dense; null where none was asked for
struct MixGrads {
  real *diag, *down, *up, *gate;
};

// a sequence: tokens start:stop of a batch row; holes: whether tokens inside it are masked
struct Sequence {
  int64_t batch, start, stop, holes;
};

struct Call {
  // sizes: `length` tokens of which the first `past` are keys alone; `maps` score maps a head; `lags` rows of the
  // tables
  int64_t length, past, heads, maps, qk, v, lags;
  int64_t window;  // keys a query reaches back over, by lag; at least the longest sequence where there is no limit
  int64_t type, norm, causal, by_lag, threads;
  double eps;
  const Sequence* sequences;
  int64_t num_sequences;
  const uint8_t* mask;  // [B, length], read where a sequence has holes
  Stream q, k, values;
  Mix routing, readout;
  real *o, *z1, *rho, *z2;  // [B, length - past, ...], dense
  // backward
  Stream grad_o;
  real *dq, *dk, *dv;
  MixGrads d_routing, d_readout;
  void* workspace;
  Team team;
  // set where q, k, values or a gate is not finite: zero times infinity reached rows that do not see it, and the caller
  // comes again with zeros in its place
  int64_t nonfinite;
};

}  // namespace hypermlp
