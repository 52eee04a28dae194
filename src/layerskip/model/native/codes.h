// Keys and values in int8, and their exact products with inputs of 16 bits.
//
// A tile holds 16 positions of a head: codes + 128 in bytes, then a float scale for each position. One word holds
// four inputs of an output. Of keys the inputs are dimensions and the outputs positions: [head_dim / 4][16][4].
// Of values the inputs are positions and the outputs dimensions: [16 / 4][head_dim][4].
// The inputs (queries, softmax weights) are integers of two digits, 255 * high + low, so that rounding them costs
// nothing next to rounding keys and values. Sums of integers are exact, and the same in any order.
#pragma once

#include "products.h"
#include "vectors.h"

namespace {

constexpr int64_t code_bytes(int64_t head_dim) { return head_dim + sizeof(float); }  // of a position
inline const float *scales_of(const char *tile, int64_t head_dim) { return (const float *)(tile + LANES * head_dim); }

inline Ints rounded(Vec v) { return (Ints)(v + 12582912.0f) - (Ints)spread(12582912.0f); }  // ties to even

// The largest magnitude, NaN if there is one
inline float largest(const float *v, int64_t n) {
  Ints most{};
  for (int64_t k = 0; k < n; k += WIDTH) most = larger(most, magnitude(load<Vec>(v + k)));
  const int32_t highest = maximum(most);
  return load<float>(&highest);
}

// Quantizes a key or value into a position of a tile. Not finite: the scale is not finite either.
inline void put_codes(char *tile, const float *v, int64_t head_dim, int64_t position, bool is_key) {
  const float scale = largest(v, head_dim) / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
  for (int64_t k = 0; k < head_dim; k += WIDTH) {
    uint8_t codes[WIDTH];
    store_bytes(codes, rounded(load<Vec>(v + k) * inverse) ^ 128);
    for (int64_t j = 0; j < WIDTH; j++) {
      const int64_t word = is_key ? (k + j) / 4 * LANES + position : position / 4 * head_dim + k + j;
      tile[4 * word + (is_key ? (k + j) % 4 : position % 4)] = codes[j];
    }
  }
  memcpy(tile + LANES * head_dim + position * sizeof(float), &scale, sizeof scale);
}

// A row of inputs: high digits, low digits, then this.
struct Digits {
  float step;  // of the integers
  int32_t high, low;  // sums of the digits
};
constexpr int64_t digits_stride(int64_t n) { return ((2 * n + (int64_t)sizeof(Digits) + 63) / 64 | 1) * 64; }

// Writes a row of n inputs.
inline void encode_digits(const float *v, int64_t n, char *row) {
  const float step = largest(v, n) / (127.0f * 255.0f), inverse = step > 0 ? 1.0f / step : 0.0f;
  Ints highs{}, lows{};
  for (int64_t k = 0; k < n; k += WIDTH) {
    const Ints whole = rounded(load<Vec>(v + k) * inverse);
    const Ints high = rounded(__builtin_convertvector(whole, Vec) * (1.0f / 255.0f)), low = whole - high * 255;
    store_bytes(row + k, high);
    store_bytes(row + n + k, low);
    highs += high, lows += low;
  }
  const Digits digits{step, sum(highs), sum(lows)};
  memcpy(row + 2 * n, &digits, sizeof digits);
}

// Codes of n inputs and their panels of 16 outputs.
struct Codes {
  const char *first;
  int64_t n;
  int64_t panel, step, group;  // bytes to the next panel, to the next four inputs, and to the next 16 inputs
  int64_t next;  // bytes to what is read after them: it is prefetched
};

// P panels times R rows; outputs follow one another in `out`, rows `of_row` floats apart.
template <int R, int P>
inline void tile_of_codes(const Codes &c, const char *codes, const char *rows, float *out, int64_t of_row) {
  const int64_t stride = digits_stride(c.n);
  Ints sums[P][R][PARTS][2];
#pragma GCC unroll 16
  for (int p = 0; p < P; p++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int i = 0; i < PARTS; i++) sums[p][r][i][0] = sums[p][r][i][1] = Ints{};
  for (int64_t k = 0; k < c.n; k += 16, codes += c.group)
    for (int64_t j = 0; j < 4; j++)
#pragma GCC unroll 16
      for (int p = 0; p < P; p++)
#pragma GCC unroll 4
        for (int i = 0; i < PARTS; i++) {
          const char *word = codes + j * c.step + p * c.panel + i * WIDTH * 4;
          const Words four = load<Words>(word);
          if (i == 0) __builtin_prefetch(word + c.next, 0, 2);
#pragma GCC unroll 16
          for (int r = 0; r < R; r++) {
            const char *at = rows + r * stride + k + 4 * j;
            sums[p][r][i][0] = dot4<INT8>(sums[p][r][i][0], four, load<uint32_t>(at));
            sums[p][r][i][1] = dot4<INT8>(sums[p][r][i][1], four, load<uint32_t>(at + c.n));
          }
        }
  constexpr int CENTRE = centre_of(INT8) - taken_off(INT8);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const Digits digits = load<Digits>(rows + r * stride + 2 * c.n);
#pragma GCC unroll 16
    for (int p = 0; p < P; p++)
#pragma GCC unroll 4
      for (int i = 0; i < PARTS; i++) {
        const Vec high = __builtin_convertvector(sums[p][r][i][0] - CENTRE * digits.high, Vec);
        const Vec low = __builtin_convertvector(sums[p][r][i][1] - CENTRE * digits.low, Vec);
        store<Vec>(out + r * of_row + p * LANES + i * WIDTH, fused(high, spread(255.0f), low) * digits.step);
      }
  }
}

template <int R, int P>
inline void panels_of_codes(const Codes &c, int64_t n_panels, const char *rows, float *out, int64_t of_row) {
  if constexpr (P > 0) {
    int64_t panel = 0;
    for (; panel + P <= n_panels; panel += P)
      tile_of_codes<R, P>(c, c.first + panel * c.panel, rows, out + panel * LANES, of_row);
    const Codes rest{c.first + panel * c.panel, c.n, c.panel, c.step, c.group, c.next};
    panels_of_codes<R, P - 1>(rest, n_panels - panel, rows, out + panel * LANES, of_row);
  }
}

// Rows that share a read of the codes. They have two accumulators for each panel.
constexpr int CODE_ROWS = PARTS > 1 ? 3 : 6;
constexpr int code_panels(int rows) { return PARTS > 1 ? 1 : 12 / rows; }

// All panels times any number of rows.
template <int R = CODE_ROWS>
inline void multiply_codes(const Codes &c, int64_t n_panels, const char *rows, int64_t n_rows, float *out, int64_t of_row) {
  if constexpr (R > 0) {
    const int64_t stride = digits_stride(c.n);
    for (; n_rows >= R; n_rows -= R, rows += R * stride, out += R * of_row)
      panels_of_codes<R, code_panels(R)>(c, n_panels, rows, out, of_row);
    multiply_codes<R - 1>(c, n_panels, rows, n_rows, out, of_row);
  }
}

}  // namespace
