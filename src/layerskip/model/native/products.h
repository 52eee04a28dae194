// Matrix products: rows of inputs times packed weights, with the same bits for any number of rows.
#pragma once

#include "threads.h"
#include "vectors.h"
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

enum Kind : int32_t { FLOAT32, BFLOAT16, INT8, INT4 };

struct Matrix {
  int32_t kind;
  int64_t out, in;
  const void *data;
  const void *scales;   // quantized: float16
  const void *offsets;  // float16, or null: the zero point is in the middle of the grid
  const float *bias;    // or null
};

// sums += four codes of weights * four inputs of -127 ... 127. Where bytes are multiplied into 16-bit
// sums, these have room for signed weights only, or for a group of int4 weights, which `settled` widens.
template <int KIND>
inline Ints dot4(Ints sums, Words weights, uint32_t inputs) {
#if defined(VECTORS_OF_16)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(inputs));
#elif defined(VECTORS_OF_8)
  const __m256i x = _mm256_set1_epi32(inputs);
  __m256i total = (__m256i)sums;
  if constexpr (KIND == INT4) {
    total = _mm256_add_epi16(total, _mm256_maddubs_epi16((__m256i)weights, x));
  } else {
    const __m256i w = (__m256i)(weights ^ 0x80808080u);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  asm("" : "+x"(total));  // added here: adding later would spill registers
  return (Ints)total;
#elif defined(__ARM_FEATURE_DOTPROD)
  if constexpr (KIND == INT8) weights ^= 0x80808080u;  // signed, like the inputs
  const int8x16_t codes = vreinterpretq_s8_u32((uint32x4_t)weights);
  return (Ints)vdotq_s32((int32x4_t)sums, codes, vreinterpretq_s8_u32(vdupq_n_u32(inputs)));
#else
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++)
    sums += (Ints)((weights >> (8 * j)) & 0xffu) * (int32_t)(int8_t)(inputs >> (8 * j));
  return sums;
#endif
}
template <int KIND>
inline Ints settled(Ints sums) {
#ifdef VECTORS_OF_8
  if constexpr (KIND == INT4) return (Ints)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1));
#endif
  return sums;
}
// The zero point that `dot4` subtracts from a code.
#if defined(VECTORS_OF_8) || defined(__ARM_FEATURE_DOTPROD)
constexpr int taken_off(int kind) { return kind == INT8 ? 128 : 0; }
#else
constexpr int taken_off(int) { return 0; }
#endif

// ---- inputs of products -------------------------------------------------------------------------

// One row of inputs in the format for a type of weights. Quantized: codes, then a pair (scale,
// scale * sum of the group's codes) for every group.
inline int64_t input_stride(int32_t kind, int64_t n) {
  const bool whole = kind == FLOAT32 || (kind == BFLOAT16 && !PAIRS);
  const int64_t bytes = whole ? 4 * n : kind == BFLOAT16 ? 2 * n : n + n / GROUP * 8;
  return ((bytes + 63) / 64 | 1) * 64;  // odd: rows 4096 bytes apart evict each other from L1
}

// Writes inputs [first, last) of a row; `at(k)` returns a vector of them.
template <class Source>
inline void encode(int32_t kind, int64_t n, int64_t first, int64_t last, char *row, Source at) {
  if (kind == FLOAT32 || (kind == BFLOAT16 && !PAIRS)) {
    for (int64_t k = first; k < last; k += WIDTH) store<Vec>(row + 4 * k, at(k));
  } else if (kind == BFLOAT16) {
    for (int64_t k = first; k < last; k += WIDTH) store<Halves>(row + 2 * k, to_bfloat16(at(k)));
  } else {
    constexpr int VECTORS = GROUP / WIDTH;
    float *steps = (float *)(row + n);
    for (int64_t k = first; k < last; k += GROUP) {
      Vec inputs[VECTORS];
      Ints most{};
      for (int i = 0; i < VECTORS; i++) {
        inputs[i] = at(k + i * WIDTH);
        most = larger(most, magnitude(inputs[i]));
      }
      const int32_t highest = maximum(most);
      const float step = load<float>(&highest) / 127.0f;  // NaN if an input is
      const float inverse = step > 0 ? 1.0f / step : 0.0f;
      const Vec magic = spread(12582912.0f);
      Ints total{};
      for (int i = 0; i < VECTORS; i++) {
        const Ints codes = (Ints)(inputs[i] * inverse + magic) - (Ints)magic;
        store<Bytes>(row + k + i * WIDTH, __builtin_convertvector(codes, Bytes));
        total += codes;
      }
      steps[k / GROUP * 2] = step;
      steps[k / GROUP * 2 + 1] = step * sum(total);
    }
  }
}

// ---- products -----------------------------------------------------------------------------------

// A view of a matrix from one of its panels on.
inline Matrix from_panel(Matrix w, int64_t panel) {
  const int64_t begin = panel * LANES, bits = w.kind == FLOAT32 ? 32 : w.kind == BFLOAT16 ? 16 : w.kind == INT8 ? 8 : 4;
  w.data = (const char *)w.data + begin * w.in * bits / 8;
  if (w.scales) w.scales = (const uint16_t *)w.scales + begin * w.in / GROUP;
  if (w.offsets) w.offsets = (const uint16_t *)w.offsets + begin * w.in / GROUP;
  if (w.bias) w.bias += begin;
  w.out -= begin;
  return w;
}

// The epilogue of a product: out = sums * scale + bias, or out += the same.
struct Sink {
  float *out;
  int64_t stride;  // floats from row to row
  int64_t end;     // number of outputs of a row
  bool adds;
  float scale;
  const float *bias;  // or null

  void operator()(int64_t row, int64_t output, Vec sums) const {
    float *to = out + row * stride + output;
    sums *= scale;
    if (output + WIDTH <= end) {
      if (bias) sums += load<Vec>(bias + output);
      store<Vec>(to, adds ? load<Vec>(to) + sums : sums);
      return;
    }
    for (int64_t i = 0; output + i < end; i++)
      to[i] = sums[i] + (bias ? bias[output + i] : 0.0f) + (adds ? to[i] : 0.0f);
  }
};

#ifdef VECTORS_OF_16
constexpr int TILES = 16;  // accumulators in registers
#else
constexpr int TILES = 12;
#endif
// Rows that share one read of the weights from L1 or L2; quantized weights need two accumulators each.
constexpr int rows_of(int kind) {
  const bool quantized = kind == INT8 || kind == INT4;
  return PARTS > 1 ? TILES / 2 : quantized ? TILES * 3 / 4 : TILES;
}
// Prefetching: whether memory is fastest panel after panel, as one stream per thread, or with several
// panels at a time; and how many vectors of floating weights, and groups of quantized ones, are prefetched
// ahead. More rows mean more arithmetic, and a longer distance.
#if defined(__znver5__)
constexpr bool one_stream(int) { return true; }
constexpr bool ONE_QUANTIZED_STREAM = true;
constexpr int ahead(int) { return 64; }
constexpr int GROUPS_AHEAD = 32;
constexpr int nearness(int) { return 3; }  // into L1
constexpr int QUANTIZED_NEARNESS = 3;
constexpr bool FETCHES_KEYS = false;  // of the next positions, during these
#elif defined(__znver4__)
constexpr bool one_stream(int rows) { return rows > 2; }
constexpr bool ONE_QUANTIZED_STREAM = true;
constexpr int ahead(int rows) { return rows > 2 ? 128 : 4; }
constexpr int GROUPS_AHEAD = 24;
constexpr int nearness(int rows) { return rows > 2 ? 2 : 3; }  // prefetches into L1 wait for each other
constexpr int QUANTIZED_NEARNESS = 2;
constexpr bool FETCHES_KEYS = true;
#else
#ifdef __znver3__
constexpr bool ONE_QUANTIZED_STREAM = true;
constexpr int GROUPS_AHEAD = 24;
#else
constexpr bool ONE_QUANTIZED_STREAM = false;
constexpr int GROUPS_AHEAD = 12;
#endif
constexpr bool one_stream(int) { return false; }
constexpr int ahead(int rows) { return PARTS > 1 && rows > 3 ? 64 : 4; }  // these read one panel at a time
constexpr int nearness(int) { return 3; }
constexpr int QUANTIZED_NEARNESS = 3;
constexpr bool FETCHES_KEYS = false;
#endif
constexpr int panels_of(int kind, int rows) {
  const bool quantized = kind == INT8 || kind == INT4;  // two accumulators each
  if (quantized ? ONE_QUANTIZED_STREAM : one_stream(kind == FLOAT32 ? rows / 2 : rows)) return 1;
  const int sums = rows * PARTS;
  if (quantized && sums > 2) return sums > TILES * 3 / 8 ? 1 : TILES * 3 / 4 / sums;
  const int tiles = quantized ? TILES / 2 : TILES;
  return sums >= tiles ? 1 : tiles / sums > 8 ? 8 : tiles / sums;
}

// Hides a constant from the compiler, which otherwise keeps all inputs of one part of a panel in registers
// for the next part, and spills.
inline int64_t unknown(int64_t k) {
  if constexpr (PARTS > 1) asm volatile("" : "+r"(k));
  return k;
}

// Group g of quantized inputs times P panels, from one part of them on.
template <int KIND, int P, int R, int PART = 0>
inline void add_group(const Matrix &w, int64_t panel, int64_t g, const char *inputs, int64_t stride,
                      Vec (&sums)[P][R][PARTS]) {
  constexpr int PACKED = KIND == INT8 ? 8 : 4;  // words of a group in a lane
  constexpr int OFF = taken_off(KIND), CENTRE = KIND == INT8 ? 128 : 8;  // of the grid, if there are no offsets
  const int64_t groups = w.in / GROUP, begin = panel * groups * LANES + PART * WIDTH;
  const uint32_t *base = (const uint32_t *)w.data + panel * groups * PACKED * LANES + PART * WIDTH;
  const uint16_t *scales = (const uint16_t *)w.scales + begin;
  const uint16_t *offsets = w.offsets ? (const uint16_t *)w.offsets + begin : nullptr;
  const int64_t at = unknown(g);
  Ints dots[P][R] = {};
#pragma GCC unroll 16
  for (int k = 0; k < PACKED; k++)
#pragma GCC unroll 16
    for (int p = 0; p < P; p++) {
      const Words weights = load<Words>(base + ((p * groups + g) * PACKED + k) * LANES);
      if constexpr ((ONE_QUANTIZED_STREAM || R > 2) && PART == 0)
        __builtin_prefetch(base + ((p * groups + g + GROUPS_AHEAD) * PACKED + k) * LANES, 0, QUANTIZED_NEARNESS);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const uint32_t *codes = (const uint32_t *)(inputs + r * stride) + at * (GROUP / 4);
        if constexpr (KIND == INT8) {
          dots[p][r] = dot4<KIND>(dots[p][r], weights, codes[k]);
        } else {
          dots[p][r] = dot4<KIND>(dots[p][r], weights & 0x0f0f0f0fu, codes[2 * k]);
          dots[p][r] = dot4<KIND>(dots[p][r], (weights >> 4) & 0x0f0f0f0fu, codes[2 * k + 1]);
        }
      }
    }
#pragma GCC unroll 16
  for (int p = 0; p < P; p++) {
    const Vec scale = from_float16(scales + (p * groups + g) * LANES);
    Vec offset = scale * (float)(OFF - CENTRE);
    if (offsets) {
      offset = from_float16(offsets + (p * groups + g) * LANES);
      if constexpr (OFF != 0) offset += scale * (float)OFF;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const float *steps = (const float *)(inputs + r * stride + w.in) + 2 * g;
      const Vec dot = __builtin_convertvector(settled<KIND>(dots[p][r]), Vec);
      sums[p][r][PART] = fused(dot, scale * steps[0], sums[p][r][PART]);
      if (OFF != CENTRE || offsets) sums[p][r][PART] = fused(offset, spread(steps[1]), sums[p][r][PART]);
    }
  }
  if constexpr (PART + 1 < PARTS) add_group<KIND, P, R, PART + 1>(w, panel, g, inputs, stride, sums);
}

// The weights of a panel for one input.
struct Column {
  Vec of[PARTS];
};
inline Column load_panel(const float *at) {
  Column column;
  for (int i = 0; i < PARTS; i++) column.of[i] = load<Vec>(at + i * WIDTH);
  return column;
}
// A panel's weights of input k times R rows: an input is broadcast once for the panel.
template <int R>
inline void add_column(const Column &weights, const char *inputs, int64_t stride, int64_t k, Vec (&sums)[R][PARTS]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const Vec input = spread(((const float *)(inputs + r * stride))[k]);
#pragma GCC unroll 16
    for (int i = 0; i < PARTS; i++) {
      Vec total = fused(weights.of[i], input, sums[r][i]);
#ifdef VECTORS_OF_8
      if constexpr (R < TILES / PARTS) asm("" : "+x"(total));  // as in `dot4`; with all registers in use the compiler does better
#endif
      sums[r][i] = total;
    }
  }
}

// P panels from `panel` on times R rows of inputs.
template <int KIND, int P, int R>
inline void tile(const Matrix &w, int64_t panel, const char *inputs, int64_t stride, Vec (&sums)[P][R][PARTS]) {
  const int64_t n = w.in;
#pragma GCC unroll 16
  for (int p = 0; p < P; p++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int i = 0; i < PARTS; i++) sums[p][r][i] = Vec{};
  if constexpr (KIND == FLOAT32) {
    const float *base = (const float *)w.data + panel * n * LANES;
    for (int64_t k = 0; k < n; k++)
#pragma GCC unroll 16
      for (int p = 0; p < P; p++) {
        const float *at = base + (p * n + k) * LANES;
        if (R > 2) __builtin_prefetch(at + 2 * ahead(R / 2) * LANES, 0, nearness(R / 2));
        add_column<R>(load_panel(at), inputs, stride, k, sums[p]);
      }
  } else if constexpr (KIND == BFLOAT16) {
    const uint32_t *base = (const uint32_t *)w.data + panel * (n / 2) * LANES;
    for (int64_t k = 0; k < n / 2; k++)
#pragma GCC unroll 16
      for (int p = 0; p < P; p++) {
        const uint32_t *at = base + (p * (n / 2) + k) * LANES;
        __builtin_prefetch(at + ahead(R) * LANES, 0, nearness(R));
#if defined(VECTORS_OF_16) && defined(__AVX512BF16__)
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
          sums[p][r][0] = dot2(sums[p][r][0], load<Words>(at), ((const uint32_t *)(inputs + r * stride))[k]);
#else
        // One input of a pair after the other, reading the weights twice: both at once would spill
        // accumulators, which slows down every row.
        Column column;
#pragma GCC unroll 16
        for (int i = 0; i < PARTS; i++) column.of[i] = (Vec)(load<Words>(at + i * WIDTH) << 16);
        add_column<R>(column, inputs, stride, unknown(2 * k), sums[p]);
        const uint32_t *again = at + unknown(0);
#pragma GCC unroll 16
        for (int i = 0; i < PARTS; i++) column.of[i] = (Vec)(load<Words>(again + i * WIDTH) & 0xffff0000u);
        add_column<R>(column, inputs, stride, unknown(2 * k + 1), sums[p]);
#endif
      }
  } else {
    for (int64_t g = 0; g < n / GROUP; g++) add_group<KIND, P, R>(w, panel, g, inputs, stride, sums);
  }
}

// All register tiles of panels [first, last) and R rows.
template <int KIND, int R, int P>
inline void panels(const Matrix &w, int64_t first, int64_t last, const char *inputs, int64_t stride,
                   int64_t row, const Sink &sink) {
  if constexpr (P > 0) {
    // As many panels as registers allow, in tiles of nearly equal width: a narrow tile is bound by
    // latency.
    while (first < last) {
      const int64_t tiles = (last - first + panels_of(KIND, R) - 1) / panels_of(KIND, R);
      if ((last - first) / tiles < P) break;
      Vec sums[P][R][PARTS];
      tile<KIND, P, R>(w, first, inputs, stride, sums);
      for (int p = 0; p < P; p++)
        for (int r = 0; r < R; r++)
          for (int i = 0; i < PARTS; i++) sink(row + r, (first + p) * LANES + i * WIDTH, sums[p][r][i]);
      first += P;
    }
    panels<KIND, R, P - 1>(w, first, last, inputs, stride, row, sink);
  }
}

template <int KIND, int R>
inline void rows(const Matrix &w, int64_t first, int64_t last, const char *inputs, int64_t stride,
                 int64_t row, int64_t n_rows, const Sink &sink) {
  if constexpr (R > 0) {
    if (n_rows == R)
      panels<KIND, R, panels_of(KIND, R)>(w, first, last, inputs, stride, row, sink);
    else
      rows<KIND, R - 1>(w, first, last, inputs, stride, row, n_rows, sink);
  }
}

// Panels [first, last) of the product with all rows. A block of panels stays in L2 for all rows.
template <int KIND>
__attribute__((noinline)) void product(const Matrix &w, int64_t first, int64_t last, const char *inputs, int64_t stride,
             int64_t n_rows, const Sink &sink) {
  constexpr int ROWS = rows_of(KIND);
  const int64_t block = n_rows > ROWS ? panels_of(KIND, ROWS) * 2 : last - first;
  const int64_t blocks = (n_rows + ROWS - 1) / ROWS;  // of rows
  for (int64_t p = first; p < last; p += block) {
    const int64_t end = p + block < last ? p + block : last;
    for (int64_t i = 0; i < blocks; i++) {
      const Share some = share(n_rows, i, blocks);
      const char *from = inputs + some.first * stride;
      rows<KIND, ROWS>(w, p, end, from, stride, some.first, some.last - some.first, sink);
    }
  }
}

// bfloat16 weights with AMX: 32 inputs of a packed panel are one AMX tile, and sixteen rows of inputs
// another. AMX accumulates in another order than vectors do, so a machine with AMX uses it for single rows
// too. Its inputs are pairs of bfloat16, in the same layout as for vector instructions on such pairs.
#if defined(VECTORS_OF_16) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define MATRIX_UNIT
constexpr int WIDE = 4, DEEP = 2 * LANES;  // panels, inputs of a tile

inline bool has_matrix_unit() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // Linux: requested once by each process
  static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return granted;
}

// Tiles 0-3 are accumulators, 4 inputs, of this many rows; 5-7 are weights.
inline void shape_tiles(int64_t n_rows) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
  } shapes;
  for (int i = 0; i < 8; i++) shapes.rows[i] = i <= WIDE ? n_rows : LANES;
  // Older GCCs believe that _tile_loadconfig reads 8 of these bytes, and drop the other writes.
  asm volatile("ldtilecfg %0" : : "m"(shapes));
}

// A matrix in AMX tiles: the first tile, and the bytes to the next panel's, to that of the next inputs, and
// from row to row in a tile.
struct Tiled {
  const char *first;
  int64_t panel, step, row;
};

template <int P>
inline void tiles(const Tiled &w, int64_t panel, int64_t steps, const char *inputs, int64_t stride, int64_t row,
                  int64_t n_rows, const Sink &sink) {
  const char *weights = w.first + panel * w.panel;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
#define STEP(J, WEIGHTS)                                       \
  if constexpr (J < P) {                                       \
    _tile_loadd(WEIGHTS, weights + J * w.panel, w.row);        \
    _tile_dpbf16ps(J, 4, WEIGHTS);                             \
  }
  for (int64_t k = 0; k < steps; k++, weights += w.step) {
    _tile_loadd(4, inputs + k * DEEP * 2, stride);
    STEP(0, 5) STEP(1, 6) STEP(2, 7) STEP(3, 5)
  }
#undef STEP
  alignas(64) float sums[LANES * LANES];
#define STORE(J)                                                                   \
  if constexpr (J < P) {                                                           \
    _tile_stored(J, sums, 64);                                                     \
    for (int64_t r = 0; r < n_rows; r++)                                           \
      sink(row + r, (panel + J) * LANES, load<Vec>(sums + r * LANES));             \
  }
  STORE(0) STORE(1) STORE(2) STORE(3)
#undef STORE
}

// Panels [first, last) times all rows of `steps` tiles of inputs
__attribute__((noinline)) void product_in_tiles(const Tiled &w, int64_t first, int64_t last, int64_t steps,
                                                const char *inputs, int64_t stride, int64_t n_rows,
                                                const Sink &sink) {
  int64_t shaped = 0;
  for (int64_t p = first; p < last; p += WIDE)
    for (int64_t row = 0; row < n_rows; row += LANES) {
      const int64_t left = n_rows - row < LANES ? n_rows - row : LANES;
      if (left != shaped) shape_tiles(shaped = left);
      const char *from = inputs + row * stride;
      switch (last - p) {
        case 1: tiles<1>(w, p, steps, from, stride, row, left, sink); break;
        case 2: tiles<2>(w, p, steps, from, stride, row, left, sink); break;
        case 3: tiles<3>(w, p, steps, from, stride, row, left, sink); break;
        default: tiles<WIDE>(w, p, steps, from, stride, row, left, sink);
      }
    }
  _tile_release();
}
#endif

inline void multiply(const Matrix &w, int64_t first, int64_t last, const char *inputs, int64_t n_rows,
              const Sink &sink) {
  const int64_t stride = input_stride(w.kind, w.in);
#ifdef MATRIX_UNIT
  if (w.kind == BFLOAT16 && w.in % DEEP == 0 && has_matrix_unit()) {
    const Tiled tiled{(const char *)w.data, w.in * LANES * 2, DEEP * LANES * 2, LANES * 4};
    return product_in_tiles(tiled, first, last, w.in / DEEP, inputs, stride, n_rows, sink);
  }
#endif
  switch (w.kind) {
    case FLOAT32: return product<FLOAT32>(w, first, last, inputs, stride, n_rows, sink);
    case BFLOAT16: return product<BFLOAT16>(w, first, last, inputs, stride, n_rows, sink);
    case INT8: return product<INT8>(w, first, last, inputs, stride, n_rows, sink);
    default: return product<INT4>(w, first, last, inputs, stride, n_rows, sink);
  }
}

}  // namespace
