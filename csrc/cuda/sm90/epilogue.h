// The common part of the two fused epilogues: the places of a thread's pairs in a tile, the vectors of their rows and
// columns, the mask of negatives, and the visitor that CUTLASS calls.
//
// The visitor has the interface of cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp. It is written by hand
// because CUTLASS's own nodes would apply the mask to every pair of every tile, and would keep the sums of 128 columns
// in local memory.
#pragma once

#include <cutlass/numeric_conversion.h>

#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>  // needs numeric_conversion.h before it

#include "../device.h"
#include "api.h"

namespace fastclip {
namespace cuda {
namespace fused {

// A tile, and the pieces in which CUTLASS passes it to an epilogue. A band is 16 rows for each warp; a piece is as high
// as a band.
template <const FusedTile& kTile_>
struct Layout {
  static constexpr FusedTile kTile = kTile_;
  static constexpr int kRows = kTile.rows, kColumns = kTile.columns, kWarps = kTile.warps(), kThreads = kWarps * kWarp;
  static constexpr int kBandRows = 16 * kWarps, kBands = kRows / kBandRows, kRowsOfThread = 2 * kBands;
  static constexpr int kPieceColumns = 32, kPieces = kColumns / kPieceColumns;
  static constexpr int kSlots = kPieceColumns / 4;  // a thread's columns of a piece
  static constexpr int kFragment = 2 * kSlots;      // its pairs in a piece
};

// The layout of wgmma's accumulator: pair q of a fragment lies in the thread's first or second row, which are 8 apart,
// and in the column of slot(q). Slots 2k and 2k + 1 are neighbouring columns; slots 2k + 2 and 2k + 3 are 8 columns
// further. lies_as_expected checks this against CuTe.
constexpr int second_row(int q) { return q / 2 % 2; }
constexpr int slot(int q) { return q / 4 * 2 + q % 2; }
constexpr int column_of_slot(int s) { return s / 2 * 8 + s % 2; }

template <class Layout, class Coordinates>
constexpr bool lies_as_expected() {
  for (int band = 0; band < Layout::kBands; band++)
    for (int piece = 0; piece < Layout::kPieces; piece++)
      for (int q = 0; q < Layout::kFragment; q++) {
        constexpr int kCopied = cute::size<0>(Coordinates{});
        const auto at = Coordinates{}(q % kCopied, 0, q / kCopied, band, piece);
        if (int(cute::get<0>(at)) != band * Layout::kBandRows + second_row(q) * 8) return false;
        if (int(cute::get<1>(at)) != piece * Layout::kPieceColumns + column_of_slot(slot(q))) return false;
      }
  return true;
}

// A number for each line of the view. Null data means that all are `absent`.
struct Vector {
  const float* data;
  float absent;
};

// A thread's share of a tile, with kVectors numbers for each of its rows and columns; the first number is the factor.
// The numbers of rows stay in registers. Those of columns stay in shared memory, from which each piece loads its own.
template <class Layout, int kVectors>
struct Share : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
  struct Storage {
    alignas(16) float columns[kVectors][Layout::kColumns];
  };

  template <class Arguments>
  __device__ __forceinline__ Share(const ChunkView& view, Storage& storage, const Arguments& arguments)
      : storage(storage), thread(arguments.thread_idx) {
    static_assert(lies_as_expected<Layout, decltype(arguments.tCcD.layout())>(), "not wgmma's accumulator");
    tile_m = cute::get<0>(arguments.tile_coord_mnkl);
    tile_n = cute::get<1>(arguments.tile_coord_mnkl);
    // CUTLASS's residues count the rows and columns from the thread's first pair to the end of the view.
    rows_left = cute::get<0>(arguments.residue_tCcD);
    columns_left = cute::get<1>(arguments.residue_tCcD);
    first_row = int(view.rows) - rows_left;
    first_column = int(view.columns) - columns_left;
    positive = first_row + int(view.offset) - first_column;
    const int tile_rows_left = int(view.rows) - tile_m * Layout::kRows;
    const int tile_columns_left = int(view.columns) - tile_n * Layout::kColumns;
    const int diagonal = tile_m * Layout::kRows + int(view.offset) - tile_n * Layout::kColumns;
    is_inside = tile_rows_left > 0 && tile_columns_left > 0;
    is_plain = tile_rows_left >= Layout::kRows && tile_columns_left >= Layout::kColumns &&
               (diagonal <= -Layout::kRows || diagonal >= Layout::kColumns);
  }

  __device__ __forceinline__ void fetch(const Vector (&x)[kVectors], const Vector (&y)[kVectors]) {
    CUTLASS_PRAGMA_UNROLL
    for (int v = 0; v < kVectors; v++) {
      CUTLASS_PRAGMA_UNROLL
      for (int r = 0; r < Layout::kRowsOfThread; r++) {
        const bool inside = x[v].data && row_from_first(r) < rows_left;
        row[v][r] = inside ? x[v].data[first_row + row_from_first(r)] : x[v].absent;
      }
      CUTLASS_PRAGMA_UNROLL
      for (int first = 0; first < Layout::kColumns; first += Layout::kThreads) {
        const int c = first + thread, j = tile_n * Layout::kColumns + c;
        const bool inside = y[v].data && j < first_column + columns_left;
        if (c < Layout::kColumns) storage.columns[v][c] = inside ? y[v].data[j] : y[v].absent;
      }
    }
  }

  // Threads read columns that others wrote. The barriers after every piece keep the next tile from writing too early.
  __device__ __forceinline__ bool begin_sync_needed() const { return true; }

  __device__ __forceinline__ void begin_loop(int band, int piece) {
    if (band != 0) return;
    const int first = first_column - tile_n * Layout::kColumns + piece * Layout::kPieceColumns;
    CUTLASS_PRAGMA_UNROLL
    for (int v = 0; v < kVectors; v++) {
      CUTLASS_PRAGMA_UNROLL
      for (int s = 0; s < Layout::kSlots; s += 2) {
        const float2 two = *reinterpret_cast<const float2*>(&storage.columns[v][first + column_of_slot(s)]);
        column[v][s] = two.x;
        column[v][s + 1] = two.y;
      }
    }
  }

  static __device__ __forceinline__ int row_from_first(int r) { return r / 2 * Layout::kBandRows + r % 2 * 8; }

  // t of pair q, by the same operations in both sweeps.
  template <class Accumulator>
  __device__ __forceinline__ float product(const Accumulator& accumulator, int q, int band) const {
    return accumulator[q] * (row[0][2 * band + second_row(q)] * column[0][slot(q)]);
  }

  // The row and the column of pair q of a fragment, counted from the thread's first pair.
  static __device__ __forceinline__ int row_of(int q, int band) { return row_from_first(2 * band + second_row(q)); }
  static __device__ __forceinline__ int column_of(int q, int piece) {
    return piece * Layout::kPieceColumns + column_of_slot(slot(q));
  }

  // True unless the pair is a positive or lies past the edges.
  __device__ __forceinline__ bool is_negative(int q, int band, int piece) const {
    const int r = row_of(q, band), c = column_of(q, piece);
    return r < rows_left && c < columns_left && c - r != positive;
  }

  Storage& storage;
  int thread, tile_m, tile_n;
  int first_row, first_column;  // of the thread, in the view
  int rows_left, columns_left;  // of the view, from the thread's first pair
  int positive;                 // column of the first row's positive, counted from the first column
  bool is_inside;               // false for tiles without pairs, which the scheduler's rounding may add
  bool is_plain;                // all pairs are negatives
  float row[kVectors][Layout::kRowsOfThread];
  float column[kVectors][Layout::kSlots];
};

// The visitor that CUTLASS calls. Work is a Share with
//   Arguments, Element (of the features), Storage, Uniform (numbers that every pair needs, which a thread reads once)
//   Work(arguments, uniform, storage, where)
template <class Work>
struct Visitor {
  using ElementAux = typename Work::Element;  // CUTLASS needs it if nothing is written
  using SharedStorage = typename Work::Storage;
  using Arguments = typename Work::Arguments;
  using Params = Arguments;

  template <class Shape>
  static Params to_underlying_arguments(const Shape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE Visitor() {}
  CUTLASS_HOST_DEVICE Visitor(const Params& params, const SharedStorage& storage)
      : params(&params), storage(const_cast<SharedStorage*>(&storage)), uniform(params) {}

  __device__ __forceinline__ bool is_producer_load_needed() const { return false; }
  __device__ __forceinline__ bool is_C_load_needed() const { return false; }

  template <class... Types>
  __device__ __forceinline__ auto get_producer_load_callbacks(
      const cutlass::epilogue::fusion::detail::ProducerLoadArgs<Types...>&) {
    return cutlass::epilogue::fusion::EmptyProducerLoadCallbacks{};
  }

  template <bool, class... Types>
  __device__ __forceinline__ auto get_consumer_store_callbacks(
      const cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Types...>& where) {
    return Work(*params, uniform, *storage, where);
  }

  const Params* params = nullptr;
  SharedStorage* storage = nullptr;
  typename Work::Uniform uniform;
};

}  // namespace fused
}  // namespace cuda
}  // namespace fastclip
