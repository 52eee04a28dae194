// The decoder's layers on a CPU: a forward pass in one call, for few rows at memory bandwidth.
//
// The kernels are batch-invariant: every output of every row is summed over the inputs in the same order,
// whatever the number of rows in the call. So verifying eight positions gives exactly the bits of eight
// single steps, in every type of weights, and self-speculative decoding equals plain decoding exactly.
//
// Weights are packed in panels (tiles of 16 outputs). In a panel the inputs follow one another, each with
// the weights of the 16 outputs, so that one vector holds 16 sums and an input is broadcast to them:
//   float32  [panel][in][16]
//   bfloat16 [panel][in / 2][16][2]
//   int8     [panel][in / 4][16][4], scales and offsets [panel][in / 32][16] in float16
//   int4     [panel][in / 8][16][4]: inputs 0-3 in the low halves of the bytes, 4-7 in the high ones
// Inputs of quantized products are rounded to int8 in groups of 32, as in GGML.
// Keys are packed in panels of 16 positions in the same way; values row by row, in bfloat16 in pairs of
// positions: [position / 2][head_dim][2].

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error fast-math is on, with which the same sums would not have the same bits everywhere
#endif

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif
#include <omp.h>
#include <sched.h>

namespace {

constexpr int LANES = 16, GROUP = 32;
#if defined(__x86_64__) && !defined(__FMA__)
#error this processor has no fused multiply-add
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error this processor puts the high bytes of a number first
#endif
#if defined(__AVX512F__) && defined(__AVX512VNNI__)  // without VNNI, bytes are multiplied in vectors of 8
#define VECTORS_OF_16
constexpr int WIDTH = 16;  // floats in a vector of this machine
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VECTORS_OF_8
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int PARTS = LANES / WIDTH;  // vectors of a panel
typedef float Vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint64_t Pairs __attribute__((vector_size(4 * WIDTH)));  // of floats
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef int8_t Bytes __attribute__((vector_size(WIDTH)));

enum Kind : int32_t { FLOAT32, BFLOAT16, INT8, INT4 };
enum Activation : int32_t { SILU, GELU_TANH };

struct Matrix {
  int32_t kind;
  int64_t out, in;
  const void *data;
  const void *scales;   // quantized: float16
  const void *offsets;  // float16, or null: the zero point is in the middle of the grid
  const float *bias;    // or null
};

struct Layer {
  const float *attention_norm, *attention_post_norm, *mlp_norm, *mlp_post_norm;  // each may be null
  const float *qk_norm;                                                          // may be null
  int32_t window;  // sliding window, the query's own position included; 0 = all positions
  int32_t rope;    // index of the rotary table
  Matrix qkv, attention_out, gate_up, down;
};

struct Model {
  int64_t hidden, heads, kv_heads, head_dim, ffn;
  float eps;
  int32_t cache_kind;  // FLOAT32 or BFLOAT16
  int32_t activation;
  const Layer *layers;
};

// ---- vectors ----------------------------------------------------------------------------------

template <class V, class T>
inline V load(const T *p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
inline void store(T *p, V v) {
  memcpy(p, &v, sizeof v);
}
inline Vec spread(float x) { return x - Vec{}; }
inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < WIDTH; i++) total += v[i];
  return total;
}
inline float maximum(Vec v) {
#ifdef VECTORS_OF_16
  return _mm512_reduce_max_ps((__m512)v);
#else
  float most = v[0];
  for (int i = 1; i < WIDTH; i++) most = v[i] > most ? v[i] : most;
  return most;
#endif
}
inline int32_t maximum(Ints v) {
#ifdef VECTORS_OF_16
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t most = v[0];
  for (int i = 1; i < WIDTH; i++) most = v[i] > most ? v[i] : most;
  return most;
#endif
}
inline int32_t sum(Ints v) {
#ifdef VECTORS_OF_16
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t total = 0;
  for (int i = 0; i < WIDTH; i++) total += v[i];
  return total;
#endif
}
// a * b + c, rounded once (FMA). Explicit, since a compiler that fuses some expressions and not others
// would give the same sum different bits.
inline Vec fused(Vec a, Vec b, Vec c) {
#ifdef VECTORS_OF_16
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(VECTORS_OF_8)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)  // GCC before 12 does not vectorize the loop to it
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  Vec sums;
  for (int i = 0; i < WIDTH; i++) sums[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return sums;
#endif
}
// Damaged weights have to be noticed, so NaN propagates through everything below. If one argument is NaN,
// these return the second.
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
// As integers, magnitudes are in the same order, with NaN above all others.
inline Ints magnitude(Vec v) { return (Ints)v & 0x7fffffff; }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }

// e^x to about 2 ulp: 2^n from the exponent bits, 2^f on [-1/2, 1/2] from a polynomial.
inline Vec exponential(Vec x) {
  x = smaller(spread(88.0f), larger(spread(-87.0f), x));
  const Vec t = x * 1.44269504f;
  const Vec shifted = t + 12582912.0f;  // rounds to an integer, in the low bits
  const Words biased = (Words)shifted - (Words)spread(12582912.0f) + 127u;  // n as a biased exponent
  const Vec f = t - (shifted - 12582912.0f);
  Vec p = spread(1.535336188e-4f);
  p = fused(p, f, spread(1.339887440e-3f));
  p = fused(p, f, spread(9.618437357e-3f));
  p = fused(p, f, spread(5.550332548e-2f));
  p = fused(p, f, spread(2.402264791e-1f));
  p = fused(p, f, spread(6.931472028e-1f));
  p = fused(p, f, spread(1.0f));
  return p * (Vec)(biased << 23);
}

inline Vec activate(int32_t activation, Vec x) {
  if (activation == SILU) return x / (exponential(-x) + 1.0f);
  const Vec u = (x + x * x * x * 0.044715f) * 1.5957691216f;  // 2 sqrt(2 / pi)
  return x - x / (exponential(u) + 1.0f);                     // x (1 + tanh(u / 2)) / 2
}

inline Halves round_to_bfloat16(Vec v) {  // nearest, ties to even; NaN with low bits alone may become Inf
  const Words bits = (Words)v;
  return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
}
inline Halves to_bfloat16(Vec v) { return round_to_bfloat16(v == v ? v : spread(NAN)); }
inline Vec from_bfloat16(Halves v) { return (Vec)(__builtin_convertvector(v, Words) << 16); }
inline Vec from_float16(const void *p) {
#ifdef VECTORS_OF_16
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(VECTORS_OF_8)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)p)));
#else  // shifts exponent and mantissa; older compilers have no _Float16
  const Ints bits = __builtin_convertvector(load<Halves>((const uint16_t *)p), Ints);
  const Ints size = (bits & 0x7fff) << 13;
  // Subnormals get a leading 1 for the time being, since a CPU may flush subnormal float32 to 0.
  const Ints small = (Ints)((Vec)(size + (113 << 23)) - 0x1p-14f);
  const Ints large = size + (112 << 23) + ((size >= 31 << 23) & 112 << 23);  // Inf or NaN
  return (Vec)((size < 1 << 23 ? small : large) | (Ints)((Words)bits >> 15 << 31));
#endif
}

inline float from_float16(uint16_t half) {
  uint16_t halves[WIDTH] = {half};
  return from_float16(halves)[0];
}

#if defined(VECTORS_OF_16) && defined(__AVX512BF16__)
constexpr bool PAIRS = true;  // multiplies pairs of bfloat16
inline Vec dot2(Vec sums, Words weights, uint32_t inputs) {
  return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(inputs));
}
#else
constexpr bool PAIRS = false;
#endif

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

struct Share {
  int64_t first, last;
};
inline Share share(int64_t n, int thread, int threads) {
  return {n * thread / threads, n * (thread + 1) / threads};
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

// ---- threads ------------------------------------------------------------------------------------

// The steps of a layer are shorter than a sleep and a wake-up, so the barrier spins; but not for long, in
// case another process needs the core.
class Team {
 public:
  void wait(int size) {
    if (size == 1) return;
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (uint32_t spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
      if (spins > 2000) sched_yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("isb" ::: "memory");  // about as long; `yield` does not pause on most ARMs
#endif
    }
  }

 private:
  alignas(128) std::atomic<int> arrived_{0};  // 128: a cache line of Apple's CPUs
  alignas(128) std::atomic<uint32_t> round_{0};
};

struct Free {
  void operator()(void *p) const { free(p); }
};
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : memory_(aligned_alloc(64, (n * sizeof(T) + 127) / 64 * 64)) {
    if (!memory_) throw std::bad_alloc();
  }
  T *get() const { return (T *)memory_.get(); }

 private:
  std::unique_ptr<void, Free> memory_;
};

// ---- forward pass ------------------------------------------------------------------------------

inline float norm_factor(const float *x, int64_t n, float eps) {
  Vec squares{};
  for (int64_t k = 0; k < n; k += WIDTH) {
    const Vec v = load<Vec>(x + k);
    squares += v * v;
  }
  return 1.0f / std::sqrt(sum(squares) / n + eps);
}

// Returns the RMS norm of a row, a vector at a time; null: no norm.
inline auto normed(const float *from, const float *norm, int64_t n, float eps) {
  const float factor = norm ? norm_factor(from, n, eps) : 1.0f;
  return [=](int64_t k) {
    const Vec v = load<Vec>(from + k) * factor;
    return norm ? v * load<Vec>(norm + k) : v;
  };
}

// Queries whose sums over values are in registers at the same time, and vectors of each: fewer than eight
// accumulators are bound by latency. A head has four or eight vectors of 16 floats.
constexpr int QUERIES = 6;
#ifdef VECTORS_OF_16
constexpr int outputs_of(int) { return 4; }
#else
constexpr int outputs_of(int queries) { return (8 + queries - 1) / queries; }
#endif
// Queries that share one read of keys and values, and positions in a chunk: those of a head stay in L1 or
// L2 for all queries. The partial softmax of each chunk is merged in their order (online softmax).
#ifdef MATRIX_UNIT
constexpr int TOGETHER = LANES;
#else
constexpr int TOGETHER = QUERIES;
#endif
constexpr int64_t CHUNK = 128, PAIRED = 2 * LANES;  // caches have whole pairs of tiles: see native_decoder.py
constexpr int MOST_HEAD_DIM = 1024;

// One sequence of a pass: its rows, and its keys and values.
struct Sequence {
  int64_t length, positions;  // positions in the cache before the pass, and rows in the pass
  char *slots;                // keys of its first layer: [KV heads, capacity, head_dim]
  int64_t capacity, stride;   // bytes between keys and values of a layer, and between values and the next layer's keys
  const float *const *turns;  // rotary tables [position][head_dim / 2][2] (cos, sin), one for each kind of embedding
  int64_t first;              // its first row: set by `run`, as the next ones are
  int64_t chunks;             // of its positions, those of the pass included
  float *partial;             // split-KV: [KV heads, chunks, queries, head_dim + 2], else null
};

struct Pass {
  const Model &m;
  float *x;  // [rows, hidden]
  const Sequence *sequences;
  int64_t batch, rows;
  const int64_t *sequence_of;  // for each row
  Team &team;
  int thread, threads;
  float *qkv, *attended, *gate_up, *projected;
  bool splits_positions;  // split-KV
  char *inputs, *gated;   // [rows, stride]: inputs of a product, and of `down`

  int64_t element() const { return m.cache_kind == FLOAT32 ? 4 : 2; }
  char *slot(int64_t layer, int which, int64_t b, int64_t head) const {
    const Sequence &s = sequences[b];
    return s.slots + (layer * 2 + which) * s.stride + head * s.capacity * m.head_dim * element();
  }

  // Encodes the inputs of a product with all threads. `source(row)` returns the argument of `encode`.
  template <class Source>
  void prepare(const Matrix &w, Source source) const {
    const int64_t groups = (w.in + GROUP - 1) / GROUP, stride = input_stride(w.kind, w.in);
    const Share mine = share(rows * groups, thread, threads);
    for (int64_t i = mine.first; i < mine.last;) {
      const int64_t row = i / groups, first = i % groups;
      const int64_t last = mine.last - row * groups < groups ? mine.last - row * groups : groups;
      const int64_t end = last * GROUP < w.in ? last * GROUP : w.in;
      encode(w.kind, w.in, first * GROUP, end, inputs + row * stride, source(row));
      i = row * groups + last;
    }
    team.wait(threads);
  }

  void prepare_normed(const Matrix &w, const float *norm) const {
    prepare(w, [&](int64_t row) { return normed(x + row * m.hidden, norm, m.hidden, m.eps); });
  }

  void multiply_into(const Matrix &w, const char *inputs, float *out) const {
    const Share mine = share((w.out + LANES - 1) / LANES, thread, threads);
    multiply(w, mine.first, mine.last, inputs, rows, {out, w.out, w.out, false, 1.0f, w.bias});
    team.wait(threads);
  }

  // The inputs of `next`: activate(gate) * up, both parts of w's product. Each thread computes gate and up
  // of the same columns, so that no barrier is needed between them.
  void multiply_gated(const Matrix &w, const Matrix &next) const {
    const int64_t ffn = m.ffn, up = ffn / LANES, stride = input_stride(next.kind, ffn);
    const Share mine = share(ffn / GROUP, thread, threads);
    const int64_t first = mine.first * (GROUP / LANES), last = mine.last * (GROUP / LANES);
    const Sink sink{gate_up, w.out, w.out, false, 1.0f, w.bias};
    multiply(w, first, last, inputs, rows, sink);
    multiply(w, up + first, up + last, inputs, rows, sink);
    const int32_t activation = m.activation;
    for (int64_t row = 0; row < rows; row++) {
      const float *from = gate_up + row * w.out;
      encode(next.kind, ffn, mine.first * GROUP, mine.last * GROUP, gated + row * stride, [=](int64_t k) {
        return activate(activation, load<Vec>(from + k)) * load<Vec>(from + ffn + k);
      });
    }
    team.wait(threads);
  }

  // x += product, normed if the layer has a post norm
  void add_product(const Matrix &w, const char *inputs, const float *post_norm) const {
    const int64_t n = m.hidden;
    if (post_norm) {
      multiply_into(w, inputs, projected);
      const Share mine = share(rows, thread, threads);
      for (int64_t row = mine.first; row < mine.last; row++) {
        const float factor = norm_factor(projected + row * n, n, m.eps);
        for (int64_t k = 0; k < n; k += WIDTH) {
          const Vec normed = load<Vec>(projected + row * n + k) * factor * load<Vec>(post_norm + k);
          store<Vec>(x + row * n + k, load<Vec>(x + row * n + k) + normed);
        }
      }
    } else {
      const Share mine = share(n / LANES, thread, threads);
      multiply(w, mine.first, mine.last, inputs, rows, {x, n, n, true, 1.0f, w.bias});
    }
    team.wait(threads);
  }

  // Applies QK norm and rotary embedding, and writes keys and values into the cache.
  void place(const Layer &layer, int64_t index) const {
    const int64_t hd = m.head_dim, all = m.heads + 2 * m.kv_heads;
    // Head by head, not row by row: most of a head was computed by the thread that writes it.
    const Share mine = share(all * rows, thread, threads);
    for (int64_t head = mine.first / rows; head * rows < mine.last; head++) {
      const int64_t first = mine.first > head * rows ? mine.first - head * rows : 0;
      const int64_t last = mine.last - head * rows < rows ? mine.last - head * rows : rows;
      for (int64_t row = first; row < last; row++) {
        const int64_t b = sequence_of[row], at = sequences[b].length + row - sequences[b].first;
        float *v = qkv + (row * all + head) * hd;
        if (head < m.heads + m.kv_heads) turn(v, layer, head, sequences[b].turns[layer.rope] + at * hd);
        if (head >= m.heads + m.kv_heads) {
          put_value(slot(index, 1, b, head - m.heads - m.kv_heads), v, at);
        } else if (head >= m.heads) {
          if (!fits_cache(v + m.kv_heads * hd)) v[0] = NAN;  // the values of this key
          put_key(slot(index, 0, b, head - m.heads), v, at);
        }
      }
    }
    team.wait(threads);
  }

  void turn(float *v, const Layer &layer, int64_t head, const float *by) const {
    const int64_t hd = m.head_dim;
    if (layer.qk_norm) {
      const float *weight = layer.qk_norm + head * hd;
      const Vec factor = spread(norm_factor(v, hd, m.eps));
      for (int64_t k = 0; k < hd; k += WIDTH) store<Vec>(v + k, load<Vec>(v + k) * factor * load<Vec>(weight + k));
    }
    // Pairs are complex numbers: (a, b) (c, s) = (a, b) c + (b, a) (-s, s).
    for (int64_t k = 0; k < hd; k += WIDTH) {
      const Pairs pairs = load<Pairs>(v + k), turned = load<Pairs>(by + k);
      const Vec cosines = (Vec)(turned << 32 | (turned & 0xffffffffu));
      const Vec sines = (Vec)((turned >> 32 | (turned & ~0xffffffffull)) ^ 0x80000000u);
      store<Vec>(v + k, (Vec)pairs * cosines + (Vec)(pairs >> 32 | pairs << 32) * sines);
    }
  }

  // Returns whether values are finite in the cache's type. If not, as in a draft that will be rejected, the
  // cache gets 0 instead and NaN in the key: queries that attend to the position get NaN, all others never
  // compute 0 times Inf.
  bool fits_cache(const float *v) const {
    Ints most{};
    for (int64_t k = 0; k < m.head_dim; k += WIDTH) most = larger(most, magnitude(load<Vec>(v + k)));
    return maximum(most) < (m.cache_kind == FLOAT32 ? 0x7f800000 : 0x7f7f8000);  // rounds to Inf
  }

  void put_key(char *keys, const float *v, int64_t at) const {
    const int64_t hd = m.head_dim, lane = at % LANES;
    keys += at / LANES * LANES * hd * element();
    if (m.cache_kind == FLOAT32) {
      for (int64_t k = 0; k < hd; k++) ((float *)keys)[k * LANES + lane] = v[k];
      return;
    }
    for (int64_t k = 0; k < hd; k += WIDTH) {
      uint32_t twos[WIDTH / 2];
      store<Halves>(twos, to_bfloat16(load<Vec>(v + k)));
      for (int64_t j = 0; j < WIDTH / 2; j++) ((uint32_t *)keys)[(k / 2 + j) * LANES + lane] = twos[j];
    }
  }

  void put_value(char *values, const float *v, int64_t at) const {
    const int64_t hd = m.head_dim;
    const bool fits = fits_cache(v);
    if (m.cache_kind == FLOAT32) {
      char *to = values + at * hd * 4;
      fits ? memcpy(to, v, hd * 4) : memset(to, 0, hd * 4);
      return;
    }
    uint16_t *to = (uint16_t *)values + at / 2 * hd * 2 + at % 2;
    for (int64_t k = 0; k < hd; k += WIDTH) {
      uint16_t rounded[WIDTH];
      store<Halves>(rounded, round_to_bfloat16(fits ? load<Vec>(v + k) : Vec{}));
      for (int64_t j = 0; j < WIDTH; j++) to[(k + j) * 2] = rounded[j];
    }
  }

  int64_t groups() const { return m.heads / m.kv_heads; }
  int64_t queries_of(int64_t b) const { return sequences[b].positions * groups(); }
  int64_t blocks_of(int64_t b) const { return (queries_of(b) + TOGETHER - 1) / TOGETHER; }

  // Queries of one sequence that share keys and values (GQA) are processed together, some at a time. If
  // there are few, threads also split the positions (split-KV, flash-decoding), each reading its part once.
  void attend(const Layer &layer, int64_t index) const {
    if (splits_positions) {
      attend_in_parts(layer, index);
    } else {
      const int64_t hd = m.head_dim;
      float parts[TOGETHER * (MOST_HEAD_DIM + 2)];
      int64_t unit = 0;
      for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0; i < m.kv_heads * blocks_of(b); i++, unit++) {
          if (unit % threads != thread) continue;
          const int64_t blocks = blocks_of(b), kv = i / blocks;
          const Share some = share(queries_of(b), i % blocks, blocks);
          Joined joined[TOGETHER];
          for (int64_t q = some.first; q < some.last; q++) joined[q - some.first].begin(attended_of(b, kv, q), hd);
          for (int64_t chunk = 0; chunk < sequences[b].chunks; chunk++) {
            answer(layer, index, b, kv, some, chunk, parts);
            for (int64_t q = 0; q < some.last - some.first; q++) joined[q].take(parts + q * (hd + 2), hd);
          }
          for (int64_t q = 0; q < some.last - some.first; q++) joined[q].end(hd);
        }
    }
    team.wait(threads);
  }

  void attend_in_parts(const Layer &layer, int64_t index) const {
    const int64_t hd = m.head_dim;
    int64_t units = 0;
    for (int64_t b = 0; b < batch; b++) units += m.kv_heads * (sequences[b].chunks - first_chunk(layer, b));
    // All blocks of a chunk go to one thread, unless some thread would be idle then.
    const bool splits_blocks = units < 4 * threads;
    if (splits_blocks) {
      units = 0;
      for (int64_t b = 0; b < batch; b++)
        units += m.kv_heads * (sequences[b].chunks - first_chunk(layer, b)) * blocks_of(b);
    }
    // Interleaves several sequences, whose chunks differ in work.
    const Share mine = share(units, thread, threads);
    int64_t unit = 0;
    for (int64_t b = 0; b < batch; b++) {
      const int64_t first = first_chunk(layer, b), reached = sequences[b].chunks - first, blocks = blocks_of(b);
      const int64_t splits = splits_blocks ? blocks : 1, at_once = splits_blocks ? 1 : blocks;
      for (int64_t i = 0; i < m.kv_heads * reached * splits; i++, unit++) {
        if (batch > 1 ? unit % threads != thread : unit < mine.first || unit >= mine.last) continue;
        const int64_t chunk = first + i / splits % reached, kv = i / splits / reached;
        for (int64_t j = 0; j < at_once; j++) {
          const Share some = share(queries_of(b), i % splits + j, blocks);
          answer(layer, index, b, kv, some, chunk, part_of(b, kv, chunk, some.first));
        }
      }
    }
    team.wait(threads);
    const Share own = share(rows * m.heads, thread, threads);
    unit = 0;
    for (int64_t b = 0; b < batch; b++) {
      const int64_t queries = queries_of(b), all = m.kv_heads * queries;
      const int64_t from = own.first > unit ? own.first - unit : 0, to = own.last < unit + all ? own.last - unit : all;
      for (int64_t i = from; i < to; i++) {
        Joined joined;
        joined.begin(attended_of(b, i / queries, i % queries), hd);
        for (int64_t chunk = first_chunk(layer, b); chunk < sequences[b].chunks; chunk++)
          joined.take(part_of(b, i / queries, chunk, i % queries), hd);
        joined.end(hd);
      }
      unit += all;
    }
  }

  float *part_of(int64_t b, int64_t kv, int64_t chunk, int64_t q) const {
    return sequences[b].partial + ((kv * sequences[b].chunks + chunk) * queries_of(b) + q) * (m.head_dim + 2);
  }

  // Prefetches into L2.
  void fetch_keys(int64_t index, int64_t b, int64_t kv, int64_t chunk) const {
    const int64_t bytes = CHUNK * m.head_dim * element();
    const char *keys = slot(index, 0, b, kv) + chunk * bytes;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(keys + at, 0, 2);
  }

  // Query q of those that share head kv of sequence b; ordered by position, then head.
  int64_t query_row(int64_t b, int64_t q) const { return sequences[b].first + q / groups(); }
  int64_t query_head(int64_t kv, int64_t q) const { return kv * groups() + q % groups(); }
  float *attended_of(int64_t b, int64_t kv, int64_t q) const {
    return attended + (query_row(b, q) * m.heads + query_head(kv, q)) * m.head_dim;
  }

  // Accumulator of the online softmax of a query: part = the sum of values with the weights
  // e^(score - maximum), then the maximum, then the sum of the weights.
  struct Joined {
    float *out;
    float top, total;

    void begin(float *to, int64_t hd) {
      out = to, top = -INFINITY, total = 0;
      memset(out, 0, hd * sizeof(float));
    }
    void take(const float *part, int64_t hd) {
      if (part[hd + 1] == 0) return;  // no position attended to
      const float highest = part[hd] > top ? part[hd] : top;
      const float before = std::exp(top - highest), here = std::exp(part[hd] - highest);
      for (int64_t k = 0; k < hd; k += WIDTH)
        store<Vec>(out + k, load<Vec>(out + k) * before + load<Vec>(part + k) * here);
      top = highest, total = total * before + part[hd + 1] * here;
    }
    void end(int64_t hd) const {
      const float inverse = 1.0f / total;
      for (int64_t k = 0; k < hd; k += WIDTH) store<Vec>(out + k, load<Vec>(out + k) * inverse);
    }
  };

  void answer(const Layer &layer, int64_t index, int64_t b, int64_t kv, const Share &some, int64_t chunk,
              float *parts) const {
    if (m.cache_kind == FLOAT32)
      answer<FLOAT32>(layer, index, b, kv, some, chunk, parts);
    else
      answer<BFLOAT16>(layer, index, b, kv, some, chunk, parts);
  }

  // Floats that hold a query's weights of a chunk: two weights each if pairs of bfloat16 are multiplied.
  template <int KIND>
  static constexpr int64_t weights_of() {
    return KIND == BFLOAT16 && PAIRS ? CHUNK / 2 : CHUNK;
  }

  // Partial results of some queries: softmax(q K / sqrt(head_dim)) V over one chunk of positions.
  template <int KIND>
  void answer(const Layer &layer, int64_t index, int64_t b, int64_t kv, const Share &some, int64_t chunk,
              float *parts) const {
    const int64_t hd = m.head_dim, width = (m.heads + 2 * m.kv_heads) * hd, groups = m.heads / m.kv_heads;
    const int64_t n = some.last - some.first, stride = input_stride(KIND, hd), of_one = hd + 2;
    const Seen all = seen(layer, b, some.first / groups, chunk).with(seen(layer, b, (some.last - 1) / groups, chunk));
    if (all.begin >= all.end) {
      for (int64_t i = 0; i < n; i++) parts[i * of_one + hd + 1] = 0;
      return;
    }
    alignas(64) char queries[TOGETHER * (4 * MOST_HEAD_DIM + 64)];
    alignas(64) float scores[TOGETHER * CHUNK];
    for (int64_t i = 0; i < n; i++) {
      const float *q = qkv + query_row(b, some.first + i) * width + query_head(kv, some.first + i) * hd;
      encode(KIND, hd, 0, hd, queries + i * stride, [=](int64_t k) { return load<Vec>(q + k); });
    }
    const int64_t start = chunk * CHUNK, first = all.begin / LANES, last = (all.end + LANES - 1) / LANES;
    const Matrix keys = from_panel({KIND, last * LANES, hd, slot(index, 0, b, kv), nullptr, nullptr, nullptr}, first);
    const float scale = 1.0f / std::sqrt((float)hd);
    float *from_first = scores + (first * LANES - start);
    multiply(keys, 0, last - first, queries, n, {from_first, CHUNK, keys.out, false, scale, nullptr});
    if (FETCHES_KEYS && splits_positions) fetch_keys(index, b, kv, chunk + 1);  // those of a prompt are in the cache already
    // Values are read in whole pairs or tiles of positions: masked positions have the weight 0.
    const Seen whole{all.begin / PAIRED * PAIRED - start, (all.end + PAIRED - 1) / PAIRED * PAIRED - start};
    const char *values = slot(index, 1, b, kv) + start * hd * element();
    constexpr int64_t of_query = weights_of<KIND>();
    alignas(64) float rounded[of_query < CHUNK ? TOGETHER * of_query : 1];
    float *weights = of_query < CHUNK ? rounded : scores;
    for (int64_t i = 0; i < n; i++)
      soften<KIND>(scores + i * CHUNK, weights + i * of_query, whole,
                   seen(layer, b, (some.first + i) / groups, chunk).from(start), parts + i * of_one + hd);
#ifdef MATRIX_UNIT
    if (KIND == BFLOAT16 && has_matrix_unit()) {
      const Tiled tiled{values + whole.begin * hd * 2, LANES * 4, PAIRED * hd * 2, hd * 4};
      return product_in_tiles(tiled, 0, hd / LANES, (whole.end - whole.begin) / DEEP,
                              (const char *)(rounded + whole.begin / 2), CHUNK * 2, n, {parts, of_one, hd, false, 1.0f, nullptr});
    }
#endif
    for (int64_t i = 0; i < n; i += QUERIES)
      weigh_values<KIND, QUERIES>(values, whole, n - i, weights + i * of_query, parts + i * of_one);
  }

  // Positions [begin, end).
  struct Seen {
    int64_t begin, end;
    Seen with(Seen other) const {
      if (begin >= end || other.begin >= other.end) return begin >= end ? other : *this;
      return {begin < other.begin ? begin : other.begin, end > other.end ? end : other.end};
    }
    Seen from(int64_t start) const { return {begin - start, end - start}; }
  };
  // The first chunk that any row of sequence b attends to.
  int64_t first_chunk(const Layer &layer, int64_t b) const {
    const int64_t length = sequences[b].length;
    return layer.window && length >= layer.window ? (length + 1 - layer.window) / CHUNK : 0;
  }
  // The positions of a chunk that a row of sequence b attends to.
  Seen seen(const Layer &layer, int64_t b, int64_t row, int64_t chunk) const {
    const int64_t end = sequences[b].length + row + 1, begin = layer.window && end > layer.window ? end - layer.window : 0;
    const int64_t start = chunk * CHUNK, stop = start + CHUNK;
    return {begin > start ? begin : start, end < stop ? end : stop};
  }

  // Turns the scores of `whole` into weights e^(score - maximum), 0 where masked, and sets maximum and sum.
  // If pairs of bfloat16 are multiplied, the weights are rounded to bfloat16 before they are summed.
  template <int KIND>
  void soften(float *scores, float *weights, Seen whole, Seen seen, float *top_and_total) const {
    if (seen.end < seen.begin) seen.end = seen.begin = whole.begin;
    for (int64_t s = whole.begin; s < seen.begin; s++) scores[s] = -INFINITY;
    for (int64_t s = seen.end; s < whole.end; s++) scores[s] = -INFINITY;
    Vec most = spread(-INFINITY), total{};
    for (int64_t s = whole.begin; s < whole.end; s += WIDTH) most = larger(most, load<Vec>(scores + s));
    const float top = maximum(most);
    for (int64_t s = whole.begin; s < whole.end; s += WIDTH) {
      const Vec score = load<Vec>(scores + s);
      Vec weight = score == -INFINITY ? Vec{} : exponential(score - top);
      if constexpr (weights_of<KIND>() < CHUNK) {
        const Halves halves = round_to_bfloat16(weight);  // NaN of bfloat16 keys has no low bits
        store<Halves>(weights + s / 2, halves);
        weight = from_bfloat16(halves);
      } else {
        store<Vec>(weights + s, weight);
      }
      total += weight;
    }
    top_and_total[0] = top, top_and_total[1] = sum(total);
  }

  // The weighted sums of values, for the first of n queries.
  template <int KIND, int Q>
  void weigh_values(const char *values, Seen whole, int64_t n, const float *weights, float *parts) const {
    if constexpr (Q > 0) {
      if (n < Q) return weigh_values<KIND, Q - 1>(values, whole, n, weights, parts);
      weigh_outputs<KIND, Q, outputs_of(Q)>(values, whole, weights, parts, 0);
    }
  }

  // For Q queries, all output vectors from one on, in tiles of nearly equal width.
  template <int KIND, int Q, int N>
  void weigh_outputs(const char *values, Seen whole, const float *weights, float *parts, int64_t first) const {
    if constexpr (N > 0) {
      for (int64_t left = m.head_dim / WIDTH - first; left > 0; left -= N, first += N) {
        const int64_t tiles = (left + outputs_of(Q) - 1) / outputs_of(Q);
        if ((left + tiles - 1) / tiles < N) return weigh_outputs<KIND, Q, N - 1>(values, whole, weights, parts, first);
        weigh<KIND, Q, N>(values, whole, first * WIDTH, weights, parts);
      }
    }
  }

  // For Q queries, N output vectors
  template <int KIND, int Q, int N>
  void weigh(const char *values, Seen whole, int64_t k, const float *weights, float *parts) const {
    // With accumulators in all registers, pairs are read twice, as in `multiply`.
    constexpr bool full = Q * N == TILES;
    Vec sums[Q][N];
#pragma GCC unroll 16
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 16
      for (int j = 0; j < N; j++) sums[i][j] = Vec{};
    for (int64_t s = whole.begin; s < whole.end; s += 2) {
      const char *at = values + (s * m.head_dim + (KIND == FLOAT32 ? k : 2 * k)) * element();
#if defined(VECTORS_OF_16) && defined(__AVX512BF16__)
      if constexpr (KIND == BFLOAT16) {
        Words pairs[N];
#pragma GCC unroll 16
        for (int j = 0; j < N; j++) pairs[j] = load<Words>(at + j * WIDTH * 4);
#pragma GCC unroll 16
        for (int i = 0; i < Q; i++) {
          const uint32_t two = load<uint32_t>(weights + i * weights_of<KIND>() + s / 2);
#pragma GCC unroll 16
          for (int j = 0; j < N; j++) sums[i][j] = dot2(sums[i][j], pairs[j], two);
        }
        continue;
      }
#endif
#pragma GCC unroll 2
      for (int second = 0; second < 2; second++) {
        Vec v[N];
#pragma GCC unroll 16
        for (int j = 0; j < N; j++) {
          if constexpr (KIND == FLOAT32) {
            v[j] = load<Vec>(at + (second * m.head_dim + j * WIDTH) * 4);
          } else {
            const Words pairs = load<Words>(at + (full ? unknown(j * WIDTH * 4) : j * WIDTH * 4));
            v[j] = (Vec)(second ? pairs & 0xffff0000u : pairs << 16);
          }
        }
#pragma GCC unroll 16
        for (int i = 0; i < Q; i++) {
          const Vec weight = spread(weights[i * CHUNK + s + second]);
#pragma GCC unroll 16
          for (int j = 0; j < N; j++) {
            Vec total = fused(v[j], weight, sums[i][j]);
#ifdef VECTORS_OF_8
            if constexpr (full) asm("" : "+x"(total));  // as in `dot4`
#endif
            sums[i][j] = total;
          }
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 16
      for (int j = 0; j < N; j++) store<Vec>(parts + i * (m.head_dim + 2) + k + j * WIDTH, sums[i][j]);
  }

  void run(const Layer &layer, int64_t index) const {
    prepare_normed(layer.qkv, layer.attention_norm);
    multiply_into(layer.qkv, inputs, qkv);
    place(layer, index);
    attend(layer, index);
    prepare(layer.attention_out, [&](int64_t row) {
      const float *from = attended + row * layer.attention_out.in;
      return [=](int64_t k) { return load<Vec>(from + k); };
    });
    add_product(layer.attention_out, inputs, layer.attention_post_norm);
    prepare_normed(layer.gate_up, layer.mlp_norm);
    multiply_gated(layer.gate_up, layer.down);
    add_product(layer.down, gated, layer.mlp_post_norm);
  }
};

// Encodes rows of norm(x) as inputs of a product, some by each thread.
inline void encode_normed(const Matrix &w, const float *norm, float eps, const float *x, int64_t rows,
                          char *inputs, int thread, int threads) {
  const Share mine = share(rows, thread, threads);
  for (int64_t row = mine.first; row < mine.last; row++) {
    char *to = inputs + row * input_stride(w.kind, w.in);
    encode(w.kind, w.in, 0, w.in, to, normed(x + row * w.in, norm, w.in, eps));
  }
}

// ---- argmax -------------------------------------------------------------------------------------

constexpr int64_t NEAR = 1024;  // outputs that are reduced while they are in L1 or L2

// The maximum of some outputs, its first index, and the sum of e^(output - maximum) (online softmax).
struct Best {
  float top = -INFINITY;
  int64_t at = 0;
  float total = 0;

  // Merges the accumulator of the outputs from `from` on
  void take(const Best &next, int64_t from) {
    if (next.top > top || total == 0) {
      const float less = total == 0 ? 0 : std::exp(top - next.top);
      *this = {next.top, from + next.at, next.total + total * less};
    } else {
      total += next.total * std::exp(next.top - top);
    }
  }
};

// Searches for the index of the maximum only if it exceeds the maximum so far.
inline Best best_of(const float *v, int64_t n, bool sums, float known) {
  Vec most = spread(-INFINITY), total{};
  int64_t k = 0;
  for (; k + WIDTH <= n; k += WIDTH) most = larger(load<Vec>(v + k), most);
  Best best{maximum(most), 0, 1};
  for (; k < n; k++) best.top = v[k] > best.top ? v[k] : best.top;
  if (best.top > known)
    while (best.at < n - 1 && v[best.at] != best.top) best.at++;
  if (sums) {
    for (k = 0; k + WIDTH <= n; k += WIDTH) total += exponential(load<Vec>(v + k) - best.top);
    best.total = sum(total);
    for (; k < n; k++) best.total += std::exp(v[k] - best.top);
  }
  return best;
}

// Returns the result of the work, 0 if it returns none, or 1 if there is not enough memory.
template <class F>
int status_of(F work) {
  try {
    if constexpr (std::is_void_v<decltype(work())>) {
      work();
      return 0;
    } else {
      return work();
    }
  } catch (const std::bad_alloc &) {
    return 1;
  }
}

// The only memory of a pass that grows with the context: each calling thread keeps its own between passes,
// with spare capacity, so that decoding does not allocate.
float *partial_sums(int64_t n) {
  thread_local std::unique_ptr<Buffer<float>> kept;
  thread_local int64_t room = 0;
  if (n > room) {
    kept.reset();
    room = 0;
    kept = std::make_unique<Buffer<float>>(2 * n);
    room = 2 * n;
  }
  return kept->get();
}

void run(const Model *m, const float *hidden, float *x, Sequence *sequences, int64_t batch, int64_t start,
         int64_t stop, int threads) {
  const int64_t hd = m->head_dim, groups = m->heads / m->kv_heads;
  int64_t rows = 0, of_partial = 0, most_chunks = 0;
  for (int64_t b = 0; b < batch; b++) {
    Sequence &s = sequences[b];
    s.first = rows, s.chunks = (s.length + s.positions + CHUNK - 1) / CHUNK;
    rows += s.positions;
    of_partial += m->kv_heads * s.chunks * s.positions * groups * (hd + 2);
    most_chunks = s.chunks > most_chunks ? s.chunks : most_chunks;
  }
  const int64_t width = (m->heads + 2 * m->kv_heads) * hd;
  const int64_t widest = m->hidden > m->heads * hd ? m->hidden : m->heads * hd;
  const Buffer<float> qkv(rows * width), attended(rows * m->heads * hd), gate_up(rows * 2 * m->ffn);
  const Buffer<float> projected(rows * m->hidden);
  const Buffer<char> inputs(rows * input_stride(FLOAT32, widest)), gated(rows * input_stride(FLOAT32, m->ffn));
  const Buffer<int64_t> sequence_of(rows);
  const bool few = rows * groups <= 16 * QUERIES && most_chunks > 1;
  float *partial = few ? partial_sums(of_partial) : nullptr;
  for (int64_t b = 0; b < batch; b++) {
    Sequence &s = sequences[b];
    for (int64_t row = s.first; row < s.first + s.positions; row++) sequence_of.get()[row] = b;
    s.partial = partial;
    if (few) partial += m->kv_heads * s.chunks * s.positions * groups * (hd + 2);
  }
  memcpy(x, hidden, rows * m->hidden * sizeof(float));
  Team team;
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    const Pass pass{*m, x, sequences, batch, rows, sequence_of.get(), team, thread, omp_get_num_threads(),
                    qkv.get(), attended.get(), gate_up.get(), projected.get(), few, inputs.get(), gated.get()};
    for (int64_t layer = start; layer < stop; layer++) pass.run(m->layers[layer], layer);
  }
}

// The sequences of a batch in one cache, [L, 2, B, KV heads, capacity, head_dim].
struct Even {
  Even(const Model *m, const int64_t *lengths, int64_t batch, int64_t positions, void *slots, int64_t capacity,
       const float *const *turns)
      : sequences(batch) {
    const int64_t of_one = m->kv_heads * capacity * m->head_dim * (m->cache_kind == FLOAT32 ? 4 : 2);
    for (int64_t b = 0; b < batch; b++)
      sequences.get()[b] = {lengths[b], positions, (char *)slots + b * of_one, capacity, batch * of_one, turns, 0, 0, nullptr};
  }
  Buffer<Sequence> sequences;
};

void product(const Matrix *w, const float *norm, float eps, const float *x, int64_t rows, float *out,
             int threads) {
  const Buffer<char> inputs(rows * input_stride(w->kind, w->in));
  Team team;
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), size = omp_get_num_threads();
    encode_normed(*w, norm, eps, x, rows, inputs.get(), thread, size);
    team.wait(size);
    const Share mine = share((w->out + LANES - 1) / LANES, thread, size);
    multiply(*w, mine.first, mine.last, inputs.get(), rows, {out, w->out, w->out, false, 1.0f, w->bias});
  }
}

void choose(const Matrix *const *parts, int64_t n_parts, const float *norm, float eps, const float *x, int64_t rows,
            int64_t *chosen, float *probabilities, int threads) {
  const Buffer<char> inputs(rows * input_stride(parts[0]->kind, parts[0]->in));
  const Buffer<float> some(threads * rows * NEAR);
  const Buffer<Best> every(threads * n_parts * rows);
  Team team;
  int size = threads;
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    if (thread == 0) size = omp_get_num_threads();
    encode_normed(*parts[0], norm, eps, x, rows, inputs.get(), thread, omp_get_num_threads());
    team.wait(omp_get_num_threads());
    float *outputs = some.get() + thread * rows * NEAR;
    for (int64_t part = 0; part < n_parts; part++) {
      const Matrix &w = *parts[part];
      Best *best = every.get() + (part * threads + thread) * rows;
      for (int64_t row = 0; row < rows; row++) best[row] = Best{};
      const Share mine = share((w.out + LANES - 1) / LANES, thread, omp_get_num_threads());
      for (int64_t p = mine.first; p < mine.last; p += NEAR / LANES) {
        const int64_t last = mine.last - p < NEAR / LANES ? mine.last : p + NEAR / LANES;
        const int64_t first = p * LANES, end = last * LANES < w.out ? last * LANES : w.out;
        const Matrix from = from_panel(w, p);
        multiply(from, 0, last - p, inputs.get(), rows, {outputs, NEAR, from.out, false, 1.0f, from.bias});
        for (int64_t row = 0; row < rows; row++)
          best[row].take(best_of(outputs + row * NEAR, end - first, probabilities != nullptr, best[row].top), first);
      }
    }
  }
  for (int64_t row = 0; row < rows; row++) {
    Best best;
    int64_t before = 0;
    for (int64_t part = 0; part < n_parts; before += parts[part++]->out)
      for (int thread = 0; thread < size; thread++)
        best.take(every.get()[(part * threads + thread) * rows + row], before);
    chosen[row] = best.at;
    if (probabilities) probabilities[row] = 1.0f / best.total;
  }
}

// Dequantizes rows of the matrix. Returns whether all indices are inside.
bool look_up(const Matrix &w, const int64_t *index, int64_t n, float *out) {
  const int64_t in = w.in, groups = in / GROUP;
  for (int64_t i = 0; i < n; i++)
    if (index[i] < 0 || index[i] >= w.out) return false;
  for (int64_t i = 0; i < n; i++) {
    const int64_t panel = index[i] / LANES, lane = index[i] % LANES;
    float *to = out + i * in;
    for (int64_t k = 0; k < in; k++) {
      if (w.kind == FLOAT32) {
        to[k] = ((const float *)w.data)[(panel * in + k) * LANES + lane];
      } else if (w.kind == BFLOAT16) {
        const uint32_t bits = ((const uint16_t *)w.data)[((panel * in / 2 + k / 2) * LANES + lane) * 2 + k % 2];
        const uint32_t widened = bits << 16;
        memcpy(to + k, &widened, 4);
      } else {
        const int64_t each = w.kind == INT8 ? 4 : 8;
        const uint8_t byte =
            ((const uint8_t *)w.data)[((panel * in / each + k / each) * LANES + lane) * 4 + k % 4];
        const int code = w.kind == INT8 ? byte : k % 8 < 4 ? byte & 15 : byte >> 4;
        const int64_t group = (panel * groups + k / GROUP) * LANES + lane;
        const float scale = from_float16(((const uint16_t *)w.scales)[group]);
        const float offset = w.offsets ? from_float16(((const uint16_t *)w.offsets)[group])
                                        : scale * (w.kind == INT8 ? -128.0f : -8.0f);
        to[k] = code * scale + offset;
      }
    }
  }
  return true;
}

}  // namespace

extern "C" {

// Layers [start, stop) over `positions` rows of each of `batch` sequences, after `lengths` positions in the cache.
int layerskip_run(const Model *m, const float *hidden, float *x, const int64_t *lengths, int64_t batch,
                   int64_t positions, int64_t start, int64_t stop, void *slots, int64_t capacity,
                   const float *const *turns, int threads) {
  return status_of([=] {
    const Even even(m, lengths, batch, positions, slots, capacity, turns);
    run(m, hidden, x, even.sequences.get(), batch, start, stop, threads);
  });
}

// The same for sequences that each have their own cache and number of rows; their rows follow one another.
int layerskip_run_rows(const Model *m, const float *hidden, float *x, Sequence *sequences, int64_t batch, int64_t start,
                       int64_t stop, int threads) {
  return status_of([=] { run(m, hidden, x, sequences, batch, start, stop, threads); });
}

// out [rows, w.out] = norm(x) times the matrix; null: no norm.
int layerskip_product(const Matrix *w, const float *norm, float eps, const float *x, int64_t rows,
                       float *out, int threads) {
  return status_of([=] { product(w, norm, eps, x, rows, out, threads); });
}

// The argmax (the first) of each row and its softmax probability (or null) of norm(x) times matrices of the
// same type, whose outputs are numbered consecutively.
int layerskip_choose(const Matrix *const *parts, int64_t n_parts, const float *norm, float eps, const float *x,
                      int64_t rows, int64_t *chosen, float *probabilities, int threads) {
  return status_of([=] { choose(parts, n_parts, norm, eps, x, rows, chosen, probabilities, threads); });
}

// One step: positions of each sequence through layers [start, stop), then the argmax of the exit's outputs for all
// rows but the first `unscored`, and its softmax probability (or null). With an embedding, tokens are looked up first,
// which fills in the hidden states; returns 2 for a token outside of the vocabulary.
int layerskip_step(const Model *m, const Matrix *embedding, const int64_t *tokens, float *hidden, float *x,
                    const int64_t *lengths, int64_t batch, int64_t positions, int64_t start, int64_t stop, void *slots,
                    int64_t capacity, const float *const *turns, int64_t unscored, const Matrix *const *parts,
                    int64_t n_parts, const float *norm, int64_t *chosen, float *probabilities, int threads) {
  return status_of([=] {
    if (embedding && !look_up(*embedding, tokens, batch * positions, hidden)) return 2;
    const Even even(m, lengths, batch, positions, slots, capacity, turns);
    run(m, hidden, x, even.sequences.get(), batch, start, stop, threads);
    const int64_t rows = batch * positions - unscored;
    choose(parts, n_parts, norm, m->eps, x + unscored * m->hidden, rows, chosen, probabilities, threads);
    return 0;
  });
}

// out [n, w.in]: rows of the matrix, as of an embedding. Returns whether all indices are inside.
int layerskip_rows(const Matrix *w, const int64_t *index, int64_t n, float *out) { return look_up(*w, index, n, out); }

// The processors that this process may run on; a thread that OpenMP has bound to one would see that one alone.
int layerskip_processors() { return omp_get_num_procs(); }
}
