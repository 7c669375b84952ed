// v = Sigma g and q = g' Sigma g of images up to 64x64 with up to four channels, in one kernel.
//
// Per image and parity the chain is  U = B' X',  Z = A' U',  Y = Lambda Z (mixing channels),  W = B Y',
// V = A W'  with A, B the odd-frequency bases of the two axes: every step is "constant times transpose of
// the last tile", see fragment.cuh. A warp owns a parity and one or two blocks of 16 row frequencies.
#pragma once

#include "image_tiles.cuh"
#include "spectrum_tiles.cuh"

namespace sgr::cuda {

struct ProductArguments {
  ImageView gradient;
  ImageView product;      // data is null where it is not wanted
  float* quadratic;       // likewise
  const float* spectrum;  // what SpectrumTiles::arrange wrote
  const uint32_t* basis;  // what BasisTiles::table built
  Geometry geometry;
};

template <class PRECISION, int CHANNELS, int IMAGES, int BLOCKS, bool SYMMETRIC>
struct FusedProduct {
  using Forward = typename PRECISION::Forward;
  using Inverse = typename PRECISION::Inverse;
  using Axis = FrequencyAxis<BLOCKS>;
  using Spectrum = SpectrumTiles<CHANNELS, BLOCKS, SYMMETRIC>;
  using Basis = BasisTiles<PRECISION, BLOCKS>;
  static constexpr int kPlanes = IMAGES * CHANNELS;
  static constexpr int kBlocks = Axis::kBlocks;
  static constexpr int kOwned = 2;                          // blocks of row frequencies per warp
  static constexpr int kWarpsPerParity = kBlocks / kOwned;  // = BLOCKS
  static constexpr int kWarps = kParities * kWarpsPerParity;
  static constexpr int kThreads = kWarps * kWarp;
  using Images = ImageTiles<IMAGES, CHANNELS, BLOCKS, kThreads>;

  // Of small images a warp has all frequencies of its parity: it keeps U and W in registers, and the spectrum has room
  // in shared memory. Large ones read the spectrum through the cache, and a parity's warps exchange U and W.
  static constexpr bool kSpectrumShared = BLOCKS == 1;
  static constexpr bool kExchange = BLOCKS > 1;
  // Where registers are scarce, constants are brought anew for each block of column frequencies, and owned blocks meet
  // those of the inverse transform one after the other.
  static constexpr bool kScarce = kPlanes * BLOCKS > 6;
  static constexpr int kSharing = kExchange && !kScarce ? kOwned : 1;

  // Shared memory in words. X and later V lie in `image`, U and later W in `exchange`; arriving images in `staging`,
  // which large ones have where later U is.
  static constexpr int kImageWords = kParities * Images::kTiles * kTileEntries;
  static constexpr int kExchangeTiles = kPlanes * kBlocks * BLOCKS;  // of one parity
  static constexpr int kExchangeWords = kExchange ? kParities * kExchangeTiles * kTileEntries : IMAGES * Images::kRoom;
  static constexpr int kSpectrumWords = kSpectrumShared ? Spectrum::kWords : 0;
  static constexpr int kScalarWords = 4 + 2 * IMAGES + IMAGES * kWarps;
  static constexpr int kSharedBytes =
      4 * (kImageWords + kExchangeWords + kSpectrumWords + Basis::kWords + kScalarWords);

  // Several blocks per multiprocessor where they fit, so that some load while others compute.
  static constexpr int kResidentBlocks = BLOCKS > 1 ? 1 : (CHANNELS > 3 ? 2 : 3);

  // The largest magnitude is brought to 2^kCeiling: then nothing in the chain reaches fp16's 2^16, since
  // |W| <= sqrt(F/2) ||X|| <= sqrt(F/2) 32 BLOCKS 2^kCeiling.
  static constexpr int kCeiling = BLOCKS == 1 ? 8 : 7;

  float* image;
  float* staging;
  uint32_t* exchange;
  const float* spectrum;
  Basis basis;
  uint64_t* barriers;              // of the arriving images and of the basis
  unsigned* maxima;                // [2][IMAGES], bits of each image's largest magnitude, this turn's and the next's
  float* partial;                  // [IMAGES][kWarps], of q
  int warp, lane, parity, member;  // of this thread's warp; member counts the warps of a parity

  __device__ FusedProduct(unsigned char* shared, const ProductArguments& arguments)
      : basis(reinterpret_cast<uint32_t*>(shared) + kImageWords + kExchangeWords + kSpectrumWords, arguments.basis,
              threadIdx.x % kWarp) {
    warp = threadIdx.x / kWarp;
    lane = threadIdx.x % kWarp;
    parity = warp / kWarpsPerParity;
    member = warp % kWarpsPerParity;
    image = reinterpret_cast<float*>(shared);
    exchange = reinterpret_cast<uint32_t*>(image + kImageWords);
    staging = reinterpret_cast<float*>(exchange);
    spectrum = reinterpret_cast<float*>(exchange + kExchangeWords);
    barriers = reinterpret_cast<uint64_t*>(exchange + kExchangeWords + kSpectrumWords + Basis::kWords);
    maxima = reinterpret_cast<unsigned*>(barriers + 2);
    partial = reinterpret_cast<float*>(maxima + 2 * IMAGES);
  }

  __device__ int exchange_tile(int plane, int block_index, int pixels) const {
    return (parity * kExchangeTiles + (plane * kBlocks + block_index) * BLOCKS + pixels) * kTileEntries;
  }

  // Brings basis and spectrum into shared memory, and sends the first images.
  __device__ void prepare(const ProductArguments& arguments, const Arrival& images) {
    Arrival constants{barriers + 1};
    images.prepare();
    constants.prepare();
    if (threadIdx.x < 2 * IMAGES) maxima[threadIdx.x] = 0;
    __syncthreads();
    constants.expect(4 * (Basis::kWords + kSpectrumWords));
    constants.copy(const_cast<uint32_t*>(basis.tiles.tiles), arguments.basis, 4 * Basis::kWords);
    if constexpr (kSpectrumShared)
      constants.copy(const_cast<float*>(spectrum), arguments.spectrum, 4 * kSpectrumWords);
    else
      spectrum = arguments.spectrum;
    Images::send(staging, arguments.gradient, arguments.geometry, first_image(0), images);
    constants.wait();
  }

  // U tiles of a plane: rows are the column frequencies of `constant`, columns the rows of each tile of pixels.
  __device__ void transform_rows(typename Forward::Tile (&u)[BLOCKS],
                                 const typename Forward::Constant (&constant)[BLOCKS], int plane) const {
    Fragment sum[BLOCKS] = {};
    const uint32_t* x =
        reinterpret_cast<const uint32_t*>(image) + (parity * Images::kTiles + plane * BLOCKS * BLOCKS) * kTileEntries;
#pragma unroll
    for (int s = 0; s < BLOCKS; ++s) {
      typename Forward::Tile data[BLOCKS];
#pragma unroll
      for (int t = 0; t < BLOCKS; ++t) load_tile(data[t], x + (t * BLOCKS + s) * kTileEntries, lane);
      Forward::template multiply<BLOCKS>(sum, constant[s], data);
    }
#pragma unroll
    for (int t = 0; t < BLOCKS; ++t) u[t] = Forward::data(sum[t]);
  }

  __device__ void load_row_constants(typename Forward::Constant (&constant)[BLOCKS], int columns) const {
#pragma unroll
    for (int s = 0; s < BLOCKS; ++s) constant[s] = basis.forward(1, parity & 1, columns, s);
  }

  // For kExchange: the warps of a parity share the blocks of column frequencies out.
  __device__ void exchange_rows() const {
#pragma unroll 1
    for (int columns = member; columns < kBlocks; columns += kWarpsPerParity) {
      typename Forward::Constant constant[BLOCKS];
      load_row_constants(constant, columns);
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        typename Forward::Tile u[BLOCKS];
        transform_rows(u, constant, plane);
#pragma unroll
        for (int t = 0; t < BLOCKS; ++t) store_tile(u[t], exchange + exchange_tile(plane, columns, t), lane);
      }
    }
  }

  // Y = Lambda Z of one image, and the lane's part of z' Lambda z.
  __device__ float mix(const Fragment* z, Fragment (&y)[CHANNELS], int rows, int columns) const {
    const float* tiles = spectrum + Spectrum::offset(0, rows, columns) + pair_offset(lane, 0, 0);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) y[c] = Fragment{};
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
      for (int d = SYMMETRIC ? c : 0; d < CHANNELS; ++d) {
        const Fragment lambda = load_fragment(tiles + Spectrum::pair(c, d) * Spectrum::kSlots, 0);
        y[c].add_product(lambda, z[d]);
        if (SYMMETRIC && c != d) y[d].add_product(lambda, z[c]);
      }
    float form = 0.0f;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
      for (int e = 0; e < kLaneEntries; ++e) form += y[c].value[e] * z[c].value[e];
    return form;
  }

  __device__ void load_column_constants(typename Forward::Constant (&constant)[kOwned][BLOCKS]) const {
#pragma unroll
    for (int owned = 0; owned < kOwned; ++owned)
#pragma unroll
      for (int t = 0; t < BLOCKS; ++t) constant[owned][t] = basis.forward(0, parity >> 1, member * kOwned + owned, t);
  }

  // From X, or U where it is exchanged, to W (rows: pixels of x, columns: this warp's row frequencies), and the parts
  // of q.
  __device__ void through_spectrum(Fragment (&w)[kOwned][BLOCKS][kPlanes], float (&form)[IMAGES], bool inverse) const {
    typename Forward::Constant constant[kOwned][BLOCKS];
    if constexpr (!kScarce) load_column_constants(constant);
#pragma unroll 1
    for (int columns = 0; columns < kBlocks; ++columns) {
      if constexpr (kScarce) load_column_constants(constant);
      Fragment z[kOwned][kPlanes];
      transform_columns(z, constant, columns);
#pragma unroll
      for (int first = 0; first < kOwned; first += kSharing) {
        typename Inverse::Tile data[kSharing][kPlanes];
#pragma unroll
        for (int s = 0; s < kSharing; ++s)
#pragma unroll
          for (int i = 0; i < IMAGES; ++i) {
            Fragment y[CHANNELS];
            form[i] += mix(z[first + s] + i * CHANNELS, y, member * kOwned + first + s, columns);
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) data[s][i * CHANNELS + c] = Inverse::data(y[c]);
          }
        if (!inverse) continue;
#pragma unroll
        for (int x = 0; x < BLOCKS; ++x) {
          const typename Inverse::Constant inverse_constant = basis.inverse(1, parity & 1, columns, x);
#pragma unroll
          for (int s = 0; s < kSharing; ++s)
            Inverse::template multiply<kPlanes>(w[first + s][x], inverse_constant, data[s]);
        }
      }
    }
  }

  // Z tiles: rows are the row frequencies of `constant`, columns the column frequencies of `columns`.
  __device__ void transform_columns(Fragment (&z)[kOwned][kPlanes],
                                    const typename Forward::Constant (&constant)[kOwned][BLOCKS], int columns) const {
    typename Forward::Constant row_constant[BLOCKS];
    if constexpr (!kExchange) load_row_constants(row_constant, columns);
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      typename Forward::Tile u[BLOCKS];
      if constexpr (kExchange) {
#pragma unroll
        for (int t = 0; t < BLOCKS; ++t) load_tile(u[t], exchange + exchange_tile(plane, columns, t), lane);
      } else {
        transform_rows(u, row_constant, plane);
      }
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        z[i][plane] = Fragment{};
#pragma unroll
        for (int t = 0; t < BLOCKS; ++t) Forward::multiply(z[i][plane], constant[i][t], u[t]);
      }
    }
  }

  // From the W tiles of all row frequencies to V tiles; a parity's warps have a row of tiles each.
  __device__ void inverse_columns() const {
    typename Inverse::Constant constant[kBlocks];
#pragma unroll
    for (int rows = 0; rows < kBlocks; ++rows) constant[rows] = basis.inverse(0, parity >> 1, rows, member);
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      Fragment sum[BLOCKS] = {};
#pragma unroll
      for (int rows = 0; rows < kBlocks; ++rows) {
        typename Inverse::Tile data[BLOCKS];
#pragma unroll
        for (int x = 0; x < BLOCKS; ++x) load_tile(data[x], exchange + exchange_tile(plane, rows, x), lane);
        Inverse::template multiply<BLOCKS>(sum, constant[rows], data);
      }
#pragma unroll
      for (int x = 0; x < BLOCKS; ++x) {
        const int tile = (plane * BLOCKS + member) * BLOCKS + x;
        store_fragment(sum[x], image + (parity * Images::kTiles + tile) * kTileEntries, lane);
      }
    }
  }

  // The same where the warp has all row frequencies.
  __device__ void inverse_own_columns(const Fragment (&w)[kOwned][BLOCKS][kPlanes]) const {
    typename Inverse::Constant constant[kOwned];
#pragma unroll
    for (int rows = 0; rows < kOwned; ++rows) constant[rows] = basis.inverse(0, parity >> 1, rows, 0);
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      Fragment sum{};
#pragma unroll
      for (int rows = 0; rows < kOwned; ++rows)
        Inverse::multiply(sum, constant[rows], Inverse::data(w[rows][0][plane]));
      store_fragment(sum, image + (parity * Images::kTiles + plane) * kTileEntries, lane);
    }
  }

  __device__ void run(const ProductArguments& arguments) {
    const Geometry& geometry = arguments.geometry;
    const bool inverse = arguments.product.data != nullptr;
    Arrival arrival{barriers};
    prepare(arguments, arrival);
    for (unsigned turn = 0; first_image(turn) < geometry.batch; ++turn) {
      unsigned* maximum = maxima + turn % 2 * IMAGES;
      Images::receive(staging, arguments.gradient, geometry, first_image(turn), arrival);
      typename Images::Entries entries;
      Images::load(entries, maximum, staging, geometry, first_image(turn));
      __syncthreads();
      if constexpr (!kExchange) Images::send(staging, arguments.gradient, geometry, first_image(turn + 1), arrival);
      Images::template store<Forward>(entries, maximum, kCeiling, reinterpret_cast<uint32_t*>(image));
      if (threadIdx.x < IMAGES) maxima[(turn + 1) % 2 * IMAGES + threadIdx.x] = 0;
      __syncthreads();
      if constexpr (kExchange) {
        exchange_rows();
        __syncthreads();
      }
      transform(inverse);
      __syncthreads();
      write_quadratic(arguments, turn);
      if constexpr (kExchange) {
        if (inverse) inverse_columns();
        Arrival::release();
        __syncthreads();
        Images::send(staging, arguments.gradient, geometry, first_image(turn + 1), arrival);
      }
      if (inverse)
        Images::write(image, maximum, kCeiling, 0.25f * normalisation(geometry), -spectrum_exponent(),
                      arguments.product, geometry, first_image(turn));
    }
  }

 private:
  // Recomputed rather than kept: registers are scarce in the chain.
  __device__ static int64_t first_image(unsigned turn) {
    return (static_cast<int64_t>(turn) * gridDim.x + blockIdx.x) * IMAGES;
  }

  __device__ int spectrum_exponent() const { return __float_as_int(spectrum[Spectrum::kEntries]); }

  __device__ static float normalisation(const Geometry& geometry) {
    return 4.0f / (static_cast<float>(geometry.rows) * geometry.columns);
  }

  // From X, or U where it is exchanged, to W tiles in shared memory and the warps' parts of q.
  __device__ void transform(bool inverse) const {
    Fragment w[kOwned][BLOCKS][kPlanes] = {};
    float form[IMAGES] = {};
    through_spectrum(w, form, inverse);
#pragma unroll
    for (int i = 0; i < IMAGES; ++i) {
      form[i] = warp_sum(form[i]);
      if (lane == 0) partial[i * kWarps + warp] = form[i];
    }
    if (!inverse) return;
    if constexpr (!kExchange) return inverse_own_columns(w);
    __syncthreads();
#pragma unroll
    for (int owned = 0; owned < kOwned; ++owned)
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane)
#pragma unroll
        for (int x = 0; x < BLOCKS; ++x)
          store_tile(Inverse::data(w[owned][x][plane]), exchange + exchange_tile(plane, member * kOwned + owned, x),
                     lane);
  }

  // The parts of q, added in the order of the warps.
  __device__ void write_quadratic(const ProductArguments& arguments, unsigned turn) const {
    const int64_t sample = first_image(turn) + threadIdx.x;
    if (!arguments.quadratic || threadIdx.x >= IMAGES || sample >= arguments.geometry.batch) return;
    float total = 0.0f;
    for (int i = 0; i < kWarps; ++i) total += partial[threadIdx.x * kWarps + i];
    const int exponent = scaling_exponent(maxima[turn % 2 * IMAGES + threadIdx.x], kCeiling);
    arguments.quadratic[sample] =
        PowerOfTwo(-2 * exponent - spectrum_exponent()) * (0.25f * normalisation(arguments.geometry) * total);
  }
};

template <class FUSED>
__global__ void __launch_bounds__(FUSED::kThreads, FUSED::kResidentBlocks)
    fused_product(const __grid_constant__ ProductArguments arguments) {
  SGR_SHARED_MEMORY(shared);
  FUSED fused(shared, arguments);
  fused.run(arguments);
}

}  // namespace sgr::cuda
