// The consumer threads of a thread block on the CPU. For each tile they call a visitor as CUTLASS's
// CollectiveEpilogue::store does, in its order and with its barriers
// (epilogue/collective/sm90_epilogue_tma_warpspecialized.hpp). A function supplies products, another receives written
// values; partitions are CuTe's own.
#pragma once

#include "intrinsics.h"

// after intrinsics.h
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "cuda/sm90/epilogue.h"

namespace emulated {

using fastclip::cuda::ChunkView;
namespace fused = fastclip::cuda::fused;

template <class Work, class Layout>
class Collective {
  using Element = typename Work::Element;
  using Tile = cute::Shape<cute::Int<Layout::kRows>, cute::Int<Layout::kColumns>, cute::_64>;
  using Piece = cute::Shape<cute::Int<Layout::kBandRows>, cute::Int<Layout::kPieceColumns>>;
  using Groups = cute::Layout<cute::Shape<cute::Int<Layout::kThreads / 128>, cute::_1, cute::_1>>;
  static constexpr auto kMajor = cute::SM90::GMMA::Major::K;
  using Mma = decltype(cute::make_tiled_mma(
      cute::SM90::GMMA::ss_op_selector<Element, Element, float, Tile, kMajor, kMajor>(), Groups{}));
  using Visitor = fused::Visitor<Work>;
  using Storage = typename Visitor::SharedStorage;

 public:
  // product(i, j) returns a product of features, inside the view. written(i, j, value) is called past its edges, too.
  template <class Product, class Written>
  static void run(const ChunkView& view, const typename Work::Arguments& arguments, int tiles_m, int tiles_n,
                  unsigned seed, Product product, Written written) {
    std::vector<char> memory(sizeof(Storage) + 128, char(0xff));  // NaN, since a GPU's shared memory is uninitialised
    void* aligned = memory.data();
    size_t space = memory.size();
    Storage& storage = *static_cast<Storage*>(std::align(128, sizeof(Storage), aligned, space));
    fibers.run(Layout::kThreads, seed, [&](unsigned thread) {
      Visitor visitor(arguments, storage);
      for (int m = 0; m < tiles_m; m++)
        for (int n = 0; n < tiles_n; n++) store(visitor, view, m, n, int(thread), product, written);
    });
  }

 private:
  template <class Product, class Written>
  static void store(Visitor& visitor, const ChunkView& view, int m, int n, int thread, Product product,
                    Written written) {
    using namespace cute;
    const int M = int(view.rows), N = int(view.columns);
    Mma mma;
    Tensor cD_mn = local_tile(make_identity_tensor(make_shape(M, N)), take<0, 2>(Tile{}), make_coord(m, n));
    Tensor accumulators = partition_fragment_C(mma, take<0, 2>(Tile{}));
    Tensor where = mma.get_slice(thread).partition_C(cD_mn);
    for (int k = 0; k < size(accumulators); k++) {
      const int i = get<0>(where(k)), j = get<1>(where(k));
      accumulators(k) = i < M && j < N ? product(i, j) : 0.f;  // TMA pads features with zeros
    }

    TiledCopy atom = make_tiled_copy_C_atom(Copy_Atom<SM90_U32x4_STSM_N, half_t>{}, mma);
    TiledCopy tiled_r2s = make_tiled_copy_S(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, atom);
    ThrCopy thread_r2s = tiled_r2s.get_slice(thread);
    Tensor tRS_rAcc = thread_r2s.retile_S(accumulators);
    Tensor tRS_cD_mn = thread_r2s.partition_S(flat_divide(cD_mn, Piece{}));
    Tensor cD = make_coord_tensor(cD_mn.layout());
    Tensor tRS_cD = make_coord_tensor(tRS_cD_mn.layout());
    auto residue_cD = make_coord(M, N) - cD_mn(_0{});
    auto residue_tRS_cD = make_coord(M, N) - tRS_cD_mn(_0{});
    Tensor unused = make_tensor<Element>(make_layout(take<0, 3>(shape(tRS_cD_mn))));
    auto where_arguments = cutlass::epilogue::fusion::detail::ConsumerStoreArgs(
        make_shape(M, N, 0, 1), Tile{}, make_coord(m, n, _, 0), mma, Piece{}, tiled_r2s, cD, residue_cD, tRS_cD,
        residue_tRS_cD, unused, thread);
    auto callbacks = visitor.template get_consumer_store_callbacks<true>(where_arguments);

    constexpr int kFragment = Layout::kFragment;
    Tensor tRS_rAcc_frg = recast<cutlass::Array<float, kFragment>>(tRS_rAcc);
    const auto barrier = [] { fibers.meet_all(); };
    const auto write_to_memory = [&](int band, int piece) {
      barrier();
      callbacks.tma_store(band, piece, 0, thread / 32 == 0);
      barrier();
    };
    constexpr int kMmaColumns = Layout::kColumns / size<2>(tRS_rAcc.layout());
    static_assert(kMmaColumns % Layout::kPieceColumns == 0);
    int last_band = -1, last_piece = -1;
    callbacks.begin();
    if (callbacks.begin_sync_needed()) barrier();
    for (int piece = 0; piece < Layout::kPieces; piece++)
      for (int band = 0; band < Layout::kBands; band++) {
        const bool is_last = piece == Layout::kPieces - 1 && band == Layout::kBands - 1;
        callbacks.begin_loop(band, piece);
        callbacks.previsit(band, piece, 0, false);
        const int mma_n = piece * Layout::kPieceColumns / kMmaColumns;
        const int in_mma = piece % (kMmaColumns / Layout::kPieceColumns);
        auto values = callbacks.visit(tRS_rAcc_frg(_, band, mma_n)(in_mma), 0, band, piece);
        if (last_band >= 0) write_to_memory(last_band, last_piece);
        last_band = band, last_piece = piece;
        callbacks.reduce(storage_of_pieces, barrier, band, piece, is_last, values);
        for (int q = 0; q < kFragment; q++) {
          const auto at = tRS_cD_mn(_, _, _, band, piece)(q);
          written(int(get<0>(at)), int(get<1>(at)), float(Element(values[q])));
        }
        callbacks.postreduce(band, piece, 0, true);
        callbacks.end_loop(band, piece);
      }
    write_to_memory(last_band, last_piece);
    callbacks.end();
  }

  inline static int storage_of_pieces = 0;  // the memory that CUTLASS's own reductions would use
};

}  // namespace emulated
