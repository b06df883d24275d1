// The arguments of the retrieval scans, without torch, and their entry points.
//
// Queries are rows (M), keys are columns (N). The score of a pair is the product of their features. A product in fp32
// decides most comparisons of scores; `exact.h` decides those that its rounding error could change.
#pragma once

#include "../../engine.h"

namespace fastclip {

// Features of both sides, and what all scans share.
struct Scan {
  Features x, y;
  int64_t m = 0, n = 0, width = 0;
  Dtype dtype = Dtype::kFloat;
  const int32_t *ids_x = nullptr, *ids_y = nullptr;  // (M), (N), or both null: pairs of equal ids are left out
  bool brgemm = false, bf16_products = false;        // as in Problem
  double rounding = 0;  // relative error of a product's terms if BLAS rounds fp32 operands, as users may allow
};

// One side's own partners and their exact scores. A line without one has the score infinity.
struct Owned {
  const int64_t* index = nullptr;
  const double* score = nullptr;
  int64_t* above = nullptr;  // out, zero before: how many pairs of the line come before its own
};

// How many keys come before each query's own, and how many queries before each key's own.
struct RankScan : Scan {
  Owned rows, columns;      // (M), (N); columns.above is null if they are not wanted
  int64_t first_query = 0;  // the index of query 0, as columns.index counts
};

// The k keys with the highest scores of each query.
struct TopScan : Scan {
  int64_t k = 0;
  double max_score = 0;        // keys above it are left out
  bool excludes_own = false;   // key i is left out for query i
  double* scores = nullptr;    // (M, k) out, descending; -inf beyond the last key
  int64_t* indices = nullptr;  // (M, k) out; -1 beyond the last key
};

// A negative for each query and for each key, drawn from the softmax of its scores times `scale`.
struct DrawScan : Scan {
  double scale = 1;
  uint64_t seed = 0;
  bool excludes_own = false;
  int64_t offset = 0;
  int64_t *rows = nullptr, *columns = nullptr;  // (M), (N) out; -1 for a line without negatives; columns may be null
};

// Exact scores of chosen pairs.
struct PairScan : Scan {
  const int64_t *i = nullptr, *j = nullptr;  // (pairs)
  int64_t pairs = 0;
  double* scores = nullptr;  // (pairs) out
};

// Compiled once per instruction set, like the engine.
#define FASTCLIP_DECLARE(capability) \
  namespace capability {             \
  void find_ranks(const RankScan&);  \
  void find_top(const TopScan&);     \
  void draw(const DrawScan&);        \
  void score(const PairScan&);       \
  }
FASTCLIP_DECLARE(DEFAULT)
FASTCLIP_DECLARE(AVX2)
FASTCLIP_DECLARE(AVX512)
#undef FASTCLIP_DECLARE

}  // namespace fastclip
