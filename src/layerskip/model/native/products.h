// Matrix products: rows of inputs times packed weights, with the same bits for any number of rows.
#pragma once

#include "threads.h"
#include "vectors.h"
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// Formats of weights. Of a quantized format, INT<bits>, a weight is code * scale + offset. TABLE4 has codes of
// 4 bits that stand for 16 bytes (GGML's IQ4_NL).
enum Kind : int32_t { FLOAT32, BFLOAT16, INT2, INT3, INT4, INT5, INT6, INT8 = 8, TABLE4 };

constexpr bool is_quantized(int kind) { return kind >= INT2; }
constexpr int bits_of(int kind) {  // of a packed weight
  return kind == FLOAT32 ? 32 : kind == BFLOAT16 ? 16 : kind == INT8 ? 8 : kind == TABLE4 ? 4 : kind;
}
// Inputs that share a scale, as in GGML's formats with so many bits.
constexpr int scaled_inputs(int kind) { return kind == INT2 || kind == INT3 || kind == INT6 ? 16 : GROUP; }
// The code of weight 0 in formats without offsets.
constexpr int centre_of(int kind) { return kind == TABLE4 ? 128 : 1 << (bits_of(kind) - 1); }
constexpr int SUPER = 256;  // inputs that share a float16 of a two-level scale

// Rows of weights in one format. Scales and offsets are float16 for every group of `scaled_inputs`, or with
// factors a float16 for every 256 inputs, times an int8 for every group.
struct Matrix {
  int32_t kind;
  float scale;  // of all outputs
  int64_t out, in;
  const void *data;
  const uint16_t *scales = nullptr, *offsets = nullptr;  // offsets: null if codes are centred on `centre_of`
  const int8_t *factors = nullptr, *offset_factors = nullptr;
  const float *bias = nullptr;
};

// Matrices of the same inputs, whose outputs follow one another. All but the last have whole panels.
struct Linear {
  int64_t out, in, n_parts;
  const Matrix *parts;

  int32_t kind() const { return parts->kind; }  // by which inputs are encoded: the same format for all parts
};

// ---- quantized weights --------------------------------------------------------------------------

// A group of 32 codes of a lane is `bits` words. The codes are cut into planes of 4, 2 and 1 bits, as the binary
// digits of `bits` say; b words hold a plane of b bits. Byte j of a word holds inputs j, j + 4, j + 8, ..., from
// the low bits to the high ones.

constexpr uint32_t repeat(uint32_t byte) { return byte * 0x01010101u; }

// Codes of inputs 4i ... 4i + 3 of a group, from a plane of B bits on
template <int BITS, int B = 8>
inline Words planes(const uint32_t *words, int i, int done = 0) {
  if constexpr (B == 0) {
    return Words{};
  } else if constexpr ((BITS & B) == 0) {
    return planes<BITS, B / 2>(words, i, done);
  } else {
    constexpr int per_word = 8 / B;
    const int from = B * (i % per_word);  // the bit
    const Words plane = load<Words>(words + (done + i / per_word) * LANES);
    const Words rest = planes<BITS, B / 2>(words, i, done + B);
    // Shifted once, before the other bits are masked
    const Words moved = from > done ? plane >> (from - done) : plane << (done - from);
    return B == 8 ? moved : rest | (moved & repeat(((1u << B) - 1) << done));
  }
}

// The values + 128 of the codes of TABLE4
alignas(16) constexpr uint8_t TABLE[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

template <int KIND>
inline Words codes_of(const uint32_t *words, int i) {
  const Words codes = planes<bits_of(KIND)>(words, i);
  if constexpr (KIND != TABLE4) return codes;
#if defined(VECTORS_OF_16)
  return (Words)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)TABLE)), (__m512i)codes);
#elif defined(VECTORS_OF_8)
  return (Words)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)TABLE)), (__m256i)codes);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (Words)vqtbl1q_u8(vld1q_u8(TABLE), (uint8x16_t)codes);
#else
  uint8_t bytes[sizeof(Words)];
  store<Words>(bytes, codes);
  for (uint8_t &byte : bytes) byte = TABLE[byte];
  return load<Words>(bytes);
#endif
}

// The code of input k of a group, in one lane
inline int code_of(int32_t kind, const uint32_t *words, int64_t lane, int64_t k) {
  const int bits = bits_of(kind), i = k / 4, byte = k % 4;
  int code = 0, done = 0;
  for (int b = 8; b; b /= 2) {
    if ((bits & b) == 0) continue;
    const uint32_t word = words[(done + i * b / 8) * LANES + lane];
    code |= (word >> (8 * byte + i * b % 8) & ((1 << b) - 1)) << done;
    done += b;
  }
  return kind == TABLE4 ? TABLE[code] : code;
}

// A format of GGML's blocks: see `block_formats.py`. Runs of codes have a multiple of 16 bytes; or one byte, in a
// second plane of single bits.
struct Blocks {
  int32_t weights, bytes, n_planes;
  int32_t flip;  // turns a code's highest bit if codes are signed
  struct Plane {
    int32_t begin, bits, run;
  } planes[2];
};

// Writes the codes of a block, one in each byte.
inline void read_codes(const Blocks &format, const uint8_t *block, uint8_t *codes) {
  typedef uint32_t Sixteen __attribute__((vector_size(16)));  // bytes; what a shift moves into one is masked
  Sixteen before = Sixteen{} + repeat(format.flip);
  int done = 0;
  for (int p = 0; p < format.n_planes; p++) {
    const auto [begin, bits, run] = format.planes[p];
    const uint8_t *from = block + begin;
    const uint32_t mask = repeat((1u << bits) - 1);
    if (run == 1) {  // bit i becomes byte i
      for (int k = 0; k < format.weights; k += 8, from++) {
        const uint64_t one = (*from * 0x0101010101010101u & 0x8040201008040201u) + 0x7f7f7f7f7f7f7f7fu;
        store(codes + k, load<uint64_t>(codes + k) ^ (one >> 7 & 0x0101010101010101u) << done);
      }
    } else {
      for (uint8_t *to = codes; to < codes + format.weights; from += run)
        for (int shift = 0; shift < 8; shift += bits, to += run)
          for (int j = 0; j < run; j += 16) {
            if (p > 0) before = load<Sixteen>(to + j);
            store(to + j, before ^ (load<Sixteen>(from + j) >> shift & mask) << done);
          }
    }
    done += bits;
  }
}

// Writes a plane of B bits of a group of codes, from the bit `done` on.
template <int B>
inline void pack_plane(const uint32_t *fours, int done, uint32_t *words) {
#pragma GCC unroll 8
  for (int w = 0; w < B; w++) {
    uint32_t word = 0;
#pragma GCC unroll 8
    for (int i = 0; i < 8 / B; i++) word |= (fours[w * 8 / B + i] >> done & repeat((1u << B) - 1)) << (B * i);
    words[(done + w) * LANES] = word;
  }
}

// Packs 16 rows of blocks; fewer rows are padded with zeros.
inline void pack_panel(const Blocks &format, int bits, const uint8_t *rows, int64_t n_rows, int64_t in, uint32_t *panel) {
  const int64_t blocks = in / format.weights;
  if (n_rows < LANES) memset(panel, 0, in * bits * LANES / 8);
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t lane = 0; lane < n_rows; lane++) {
      uint32_t fours[SUPER / 4];
      read_codes(format, rows + (lane * blocks + block) * format.bytes, (uint8_t *)fours);
      for (int g = 0; g < format.weights / GROUP; g++) {
        const uint32_t *codes = fours + g * GROUP / 4;
        uint32_t *words = panel + (block * format.weights / GROUP + g) * bits * LANES + lane;
        if (bits & 8) pack_plane<8>(codes, 0, words);
        if (bits & 4) pack_plane<4>(codes, 0, words);
        if (bits & 2) pack_plane<2>(codes, bits & 4, words);
        if (bits & 1) pack_plane<1>(codes, bits & 6, words);
      }
    }
}

// Scales or offsets of a vector of lanes, for one group of those of a matrix. Always inlined: a function
// call would spill all sums to memory.
template <int KIND>
__attribute__((always_inline)) inline Vec grid(const uint16_t *halves, const int8_t *factors, int64_t group, int64_t lane) {
  if (!factors) return from_float16(halves + group * LANES + lane);
  const Vec whole = from_float16(halves + group / (SUPER / scaled_inputs(KIND)) * LANES + lane);
  return whole * from_bytes(factors + group * LANES + lane);
}
inline float grid(int32_t kind, const uint16_t *halves, const int8_t *factors, int64_t group, int64_t lane) {
  if (!factors) return from_float16(halves[group * LANES + lane]);
  return from_float16(halves[group / (SUPER / scaled_inputs(kind)) * LANES + lane]) * factors[group * LANES + lane];
}

// sums += four codes of weights * four inputs of -127 ... 127. AVX2 multiplies bytes into 16-bit sums, which have
// room for a group of codes of 4 bits, or of 5 and 6 bits around 0; `settled` widens them.
template <int KIND>
inline Ints dot4(Ints sums, Words weights, uint32_t inputs) {
  [[maybe_unused]] constexpr int BITS = KIND == TABLE4 ? 8 : bits_of(KIND);
#if defined(VECTORS_OF_16)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(inputs));
#elif defined(VECTORS_OF_8)
  const __m256i x = _mm256_set1_epi32(inputs);
  __m256i total = (__m256i)sums;
  if constexpr (BITS <= 4) {
    total = _mm256_add_epi16(total, _mm256_maddubs_epi16((__m256i)weights, x));
  } else {
    const __m256i w = _mm256_sub_epi8((__m256i)weights, _mm256_set1_epi8((char)centre_of(KIND)));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    total = BITS < 8 ? _mm256_add_epi16(total, pairs)
                     : _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  asm("" : "+x"(total));  // added here: adding later would spill registers
  return (Ints)total;
#elif defined(__ARM_FEATURE_DOTPROD)
  if constexpr (BITS == 8) weights ^= 0x80808080u;  // signed, like the inputs
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
  if constexpr (bits_of(KIND) < 8 && KIND != TABLE4)
    return (Ints)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1));
#endif
  return sums;
}
// The zero point that `dot4` subtracts from a code.
constexpr int taken_off(int kind) {
#if defined(VECTORS_OF_8)
  return bits_of(kind) > 4 || kind == TABLE4 ? centre_of(kind) : 0;
#elif defined(__ARM_FEATURE_DOTPROD)
  return kind == INT8 || kind == TABLE4 ? 128 : 0;
#else
  return 0 * kind;
#endif
}

// ---- inputs of products -------------------------------------------------------------------------

// One row of inputs in the format for a type of weights. Quantized: codes in groups of 32, then four numbers
// for every group: its scale, and scale * sum of the codes of the group, of its first and of its second half.
inline int64_t input_stride(int32_t kind, int64_t n) {
  const bool whole = kind == FLOAT32 || (kind == BFLOAT16 && !PAIRS);
  const int64_t bytes = whole ? 4 * n : kind == BFLOAT16 ? 2 * n : n + n / GROUP * 16;
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
      Ints totals[2] = {};
      for (int i = 0; i < VECTORS; i++) {
        const Ints codes = (Ints)(inputs[i] * inverse + magic) - (Ints)magic;
        store<Bytes>(row + k + i * WIDTH, __builtin_convertvector(codes, Bytes));
        totals[i * 2 / VECTORS] += codes;
      }
      const int32_t first = sum(totals[0]), second = sum(totals[1]);
      const float numbers[4] = {step, step * (first + second), step * first, step * second};
      memcpy(steps + k / GROUP * 4, numbers, sizeof numbers);
    }
  }
}

// ---- products -----------------------------------------------------------------------------------

// A view of a matrix from one of its panels on.
inline Matrix from_panel(Matrix w, int64_t panel) {
  const int64_t begin = panel * LANES, groups = begin * w.in / scaled_inputs(w.kind);
  w.data = (const char *)w.data + begin * w.in * bits_of(w.kind) / 8;
  if (w.scales) w.scales += w.factors ? begin * w.in / SUPER : groups;
  if (w.offsets) w.offsets += w.offset_factors ? begin * w.in / SUPER : groups;
  if (w.factors) w.factors += groups;
  if (w.offset_factors) w.offset_factors += groups;
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
  return PARTS > 1 ? TILES / 2 : is_quantized(kind) ? TILES * 3 / 4 : TILES;
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
constexpr bool FETCHES_CHUNKS = false;  // of keys and values, during the one before
#elif defined(__znver4__)
constexpr bool one_stream(int rows) { return rows > 2; }
constexpr bool ONE_QUANTIZED_STREAM = true;
constexpr int ahead(int rows) { return rows > 2 ? 128 : 4; }
constexpr int GROUPS_AHEAD = 24;
constexpr int nearness(int rows) { return rows > 2 ? 2 : 3; }  // prefetches into L1 wait for each other
constexpr int QUANTIZED_NEARNESS = 2;
constexpr bool FETCHES_CHUNKS = true;
#else
#ifdef __znver3__
constexpr bool ONE_QUANTIZED_STREAM = true;
constexpr int GROUPS_AHEAD = 24;
#else
constexpr bool ONE_QUANTIZED_STREAM = false;
constexpr int GROUPS_AHEAD = 12;
#endif
constexpr bool one_stream(int) { return false; }
constexpr int ahead(int rows) {
  if (PARTS > 1) return rows > 3 ? 64 : 4;  // these read one panel at a time
  return rows > 1 ? 32 : 4;
}
constexpr int nearness(int) { return 3; }
constexpr int QUANTIZED_NEARNESS = 3;
constexpr bool FETCHES_CHUNKS = false;
#endif
// `near`: the weights are in L2 or arrive there in time, so that only registers limit the panels.
constexpr int panels_of(int kind, int rows, bool near = false) {
  const bool quantized = is_quantized(kind);  // two accumulators each
  if (near) return TILES / (rows * PARTS) > 0 ? TILES / (rows * PARTS) : 1;
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
  constexpr int BITS = bits_of(KIND), SCALES = GROUP / scaled_inputs(KIND), FOURS = GROUP / 4 / SCALES;
  constexpr int OFF = taken_off(KIND), CENTRE = centre_of(KIND);
  const int64_t groups = w.in / GROUP, at = unknown(g);
#pragma GCC unroll 16
  for (int p = 0; p < P; p++) {
    const int64_t group = (panel + p) * groups + g;
    const uint32_t *words = (const uint32_t *)w.data + group * BITS * LANES + PART * WIDTH;
    if constexpr (PART == 0) {
      // After the end of this panel comes the one at the same place in the next tile.
      const int64_t next = GROUPS_AHEAD + (g + GROUPS_AHEAD < groups ? 0 : (P - 1) * groups);
#pragma GCC unroll 16
      for (int k = 0; k < BITS; k++)
        __builtin_prefetch(words + (next * BITS + k) * LANES, 0, QUANTIZED_NEARNESS);
    }
#pragma GCC unroll 2
    for (int part = 0; part < SCALES; part++) {
      Ints dots[R] = {};
#pragma GCC unroll 16
      for (int i = part * FOURS; i < (part + 1) * FOURS; i++) {
        const Words codes = codes_of<KIND>(words, i);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
          dots[r] = dot4<KIND>(dots[r], codes, ((const uint32_t *)(inputs + r * stride))[at * (GROUP / 4) + i]);
      }
      const Vec scale = grid<KIND>(w.scales, w.factors, group * SCALES + part, PART * WIDTH);
      Vec offset = scale * (float)(OFF - CENTRE);
      if (w.offsets) {
        offset = grid<KIND>(w.offsets, w.offset_factors, group * SCALES + part, PART * WIDTH);
        if constexpr (OFF != 0) offset += scale * (float)OFF;
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const float *steps = (const float *)(inputs + r * stride + w.in) + 4 * g;
        const Vec dot = __builtin_convertvector(settled<KIND>(dots[r]), Vec);
        Vec &total = sums[p][r][PART];
        total = fused(dot, scale * steps[0], total);
        if (OFF != CENTRE || w.offsets) total = fused(offset, spread(steps[SCALES == 1 ? 1 : 2 + part]), total);
      }
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
#ifdef PAIRS_OF_BFLOAT16
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
template <int KIND, int R, int P, bool NEAR>
inline void panels(const Matrix &w, int64_t first, int64_t last, const char *inputs, int64_t stride,
                   int64_t row, const Sink &sink) {
  if constexpr (P > 0) {
    // As many panels as registers allow, in tiles of nearly equal width: a narrow tile is bound by
    // latency.
    while (first < last) {
      const int64_t tiles = (last - first + panels_of(KIND, R, NEAR) - 1) / panels_of(KIND, R, NEAR);
      if ((last - first) / tiles < P) break;
      Vec sums[P][R][PARTS];
      tile<KIND, P, R>(w, first, inputs, stride, sums);
      for (int p = 0; p < P; p++)
        for (int r = 0; r < R; r++)
          for (int i = 0; i < PARTS; i++) sink(row + r, (first + p) * LANES + i * WIDTH, sums[p][r][i]);
      first += P;
    }
    panels<KIND, R, P - 1, NEAR>(w, first, last, inputs, stride, row, sink);
  }
}

template <int KIND, int R, bool NEAR>
inline void rows(const Matrix &w, int64_t first, int64_t last, const char *inputs, int64_t stride,
                 int64_t row, int64_t n_rows, const Sink &sink) {
  if constexpr (R > 0) {
    if (n_rows == R)
      panels<KIND, R, panels_of(KIND, R, NEAR), NEAR>(w, first, last, inputs, stride, row, sink);
    else
      rows<KIND, R - 1, NEAR>(w, first, last, inputs, stride, row, n_rows, sink);
  }
}

// Panels [first, last) of the product with all rows. A block of panels stays in L2 for all rows.
template <int KIND, bool NEAR = false>
__attribute__((noinline)) void product(const Matrix &w, int64_t first, int64_t last, const char *inputs, int64_t stride,
             int64_t n_rows, const Sink &sink) {
  constexpr int ROWS = rows_of(KIND);
  const int64_t block = n_rows > ROWS ? panels_of(KIND, ROWS, NEAR) * 2 : last - first;
  const int64_t blocks = (n_rows + ROWS - 1) / ROWS;  // of rows
  for (int64_t p = first; p < last; p += block) {
    const int64_t end = p + block < last ? p + block : last;
    for (int64_t i = 0; i < blocks; i++) {
      const Share some = share(n_rows, i, blocks);
      const char *from = inputs + some.first * stride;
      rows<KIND, ROWS, NEAR>(w, p, end, from, stride, some.first, some.last - some.first, sink);
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
#define CASE(KIND) case KIND: return product<KIND>(w, first, last, inputs, stride, n_rows, sink);
    CASE(FLOAT32) CASE(BFLOAT16) CASE(INT2) CASE(INT3) CASE(INT4) CASE(INT5) CASE(INT6) CASE(INT8) CASE(TABLE4)
#undef CASE
  }
}

// The first panels of a matrix of keys, which is near.
template <int KIND>
inline void multiply_near(const Matrix &w, int64_t n_panels, const char *inputs, int64_t n_rows, const Sink &sink) {
#ifdef MATRIX_UNIT
  if (KIND == BFLOAT16 && w.in % DEEP == 0 && has_matrix_unit()) return multiply(w, 0, n_panels, inputs, n_rows, sink);
#endif
  product<KIND, true>(w, 0, n_panels, inputs, input_stride(KIND, w.in), n_rows, sink);
}

// Panels [first, last) of all parts, numbered consecutively; `out` has output 0 of every row.
inline void multiply(const Linear &w, int64_t first, int64_t last, const char *inputs, int64_t n_rows, float *out,
                     int64_t stride, bool adds = false) {
  for (const Matrix *part = w.parts; part < w.parts + w.n_parts; part++) {
    const int64_t panels = (part->out + LANES - 1) / LANES, end = last < panels ? last : panels;
    if (first < end) multiply(*part, first, end, inputs, n_rows, {out, stride, part->out, adds, part->scale, part->bias});
    out += part->out;
    first = first > panels ? first - panels : 0;
    last -= panels;
  }
}

}  // namespace
