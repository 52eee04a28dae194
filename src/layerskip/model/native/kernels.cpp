// The decoder's layers on a CPU: a forward pass in one call, for few rows at memory bandwidth.
//
// The kernels are batch-invariant: every output of every row is summed over the inputs in the same order,
// whatever the number of rows in the call and of threads. So verifying eight positions gives exactly the
// bits of eight single steps, in every type of weights, and self-speculative decoding equals plain decoding
// exactly.
//
// Weights are packed in panels (tiles of 16 outputs). In a panel the inputs follow one another, each with
// the weights of the 16 outputs, so that one vector holds 16 sums and an input is broadcast to them:
//   float32   [panel][in][16]
//   bfloat16  [panel][in / 2][16][2]
//   quantized [panel][in / 32][bits][16] words of codes, see products.h; scales and offsets [panel][group][16]
// Inputs of quantized products are rounded to int8 in groups of 32, as in GGML.
// Keys are packed in panels of 16 positions in the same way; values row by row, in bfloat16 in pairs of
// positions: [position / 2][head_dim][2]. In int8 both have codes in tiles of 16 positions, see codes.h.

#include "codes.h"
#include "products.h"
#include "threads.h"
#include "vectors.h"
#include <cmath>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <omp.h>

namespace {

struct Layer {
  const float *attention_norm, *attention_post_norm, *mlp_norm, *mlp_post_norm;  // each may be null
  const float *qk_norm;                                                          // may be null
  int32_t window;  // sliding window, the query's own position included; 0 = all positions
  int32_t rope;    // index of the rotary table
  Linear qkv, attention_out, gate_up, down;
};

struct Model {
  int64_t hidden, heads, kv_heads, head_dim, ffn;
  float eps;
  int32_t cache_kind;  // FLOAT32, BFLOAT16 or INT8
  int32_t activation;
  const Layer *layers;

  int64_t position_bytes() const {  // of a head's keys or values
    return cache_kind == INT8 ? code_bytes(head_dim) : head_dim * (cache_kind == FLOAT32 ? 4 : 2);
  }
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

  // Keys or values of a head, from a position on: the first one of a tile
  char *slot(int64_t layer, int which, int64_t b, int64_t head, int64_t position = 0) const {
    const Sequence &s = sequences[b];
    return s.slots + (layer * 2 + which) * s.stride + (head * s.capacity + position) * m.position_bytes();
  }

  // Encodes the inputs of a product with all threads. `source(row)` returns the argument of `encode`.
  template <class Source>
  void prepare(const Linear &w, Source source) const {
    const int64_t groups = (w.in + GROUP - 1) / GROUP, stride = input_stride(w.kind(), w.in);
    const Share mine = share(rows * groups, thread, threads);
    for (int64_t i = mine.first; i < mine.last;) {
      const int64_t row = i / groups, first = i % groups;
      const int64_t last = mine.last - row * groups < groups ? mine.last - row * groups : groups;
      const int64_t end = last * GROUP < w.in ? last * GROUP : w.in;
      encode(w.kind(), w.in, first * GROUP, end, inputs + row * stride, source(row));
      i = row * groups + last;
    }
    team.wait(threads);
  }

  void prepare_normed(const Linear &w, const float *norm) const {
    prepare(w, [&](int64_t row) { return normed(x + row * m.hidden, norm, m.hidden, m.eps); });
  }

  void multiply_into(const Linear &w, const char *inputs, float *out) const {
    const Share mine = share((w.out + LANES - 1) / LANES, thread, threads);
    multiply(w, mine.first, mine.last, inputs, rows, out, w.out);
    team.wait(threads);
  }

  // The inputs of `next`: activate(gate) * up, both parts of w's product. Each thread computes gate and up
  // of the same columns, so that no barrier is needed between them.
  void multiply_gated(const Linear &w, const Linear &next) const {
    const int64_t ffn = m.ffn, up = ffn / LANES, stride = input_stride(next.kind(), ffn);
    const Share mine = share(ffn / GROUP, thread, threads);
    const int64_t first = mine.first * (GROUP / LANES), last = mine.last * (GROUP / LANES);
    multiply(w, first, last, inputs, rows, gate_up, w.out);
    multiply(w, up + first, up + last, inputs, rows, gate_up, w.out);
    const int32_t activation = m.activation;
    for (int64_t row = 0; row < rows; row++) {
      const float *from = gate_up + row * w.out;
      encode(next.kind(), ffn, mine.first * GROUP, mine.last * GROUP, gated + row * stride, [=](int64_t k) {
        return activate(activation, load<Vec>(from + k)) * load<Vec>(from + ffn + k);
      });
    }
    team.wait(threads);
  }

  // x += product, normed if the layer has a post norm
  void add_product(const Linear &w, const char *inputs, const float *post_norm) const {
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
      multiply(w, mine.first, mine.last, inputs, rows, x, n, true);
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
          put_value(slot(index, 1, b, head - m.heads - m.kv_heads, at / LANES * LANES), v, at % LANES);
        } else if (head >= m.heads) {
          if (!fits_cache(v + m.kv_heads * hd)) v[0] = NAN;  // the values of this key
          put_key(slot(index, 0, b, head - m.heads, at / LANES * LANES), v, at % LANES);
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
    return maximum(most) < (m.cache_kind == BFLOAT16 ? 0x7f7f8000 : 0x7f800000);  // rounds to Inf
  }

  // Write into a tile of 16 positions.
  void put_key(char *keys, const float *v, int64_t lane) const {
    const int64_t hd = m.head_dim;
    if (m.cache_kind == INT8) return put_codes(keys, v, hd, lane, true);
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
    if (m.cache_kind == INT8) {
      static const float zeros[MOST_HEAD_DIM] = {};
      return put_codes(values, fits ? v : zeros, hd, at, false);
    }
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

  // Bytes from the keys or values of a chunk to those that are read next: of the next chunk or KV head. They are
  // prefetched into L2 meanwhile, since the processor's own prefetching ends with each page of memory.
  int64_t to_next_chunk(const Layer &layer, int64_t b, int64_t kv, int64_t chunk) const {
    if (!FETCHES_CHUNKS || !splits_positions) return 0;  // those of a prompt are in L2 already
    if (chunk + 1 < sequences[b].chunks) return CHUNK * m.position_bytes();
    if (kv + 1 == m.kv_heads) return 0;
    return (sequences[b].capacity - (chunk - first_chunk(layer, b)) * CHUNK) * m.position_bytes();
  }

  void fetch_keys(const char *keys) const {
    for (int64_t at = 0; at < CHUNK * m.position_bytes(); at += 64) __builtin_prefetch(keys + at, 0, 2);
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
    else if (m.cache_kind == BFLOAT16)
      answer<BFLOAT16>(layer, index, b, kv, some, chunk, parts);
    else
      answer<INT8>(layer, index, b, kv, some, chunk, parts);
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
    const int64_t n = some.last - some.first, of_one = hd + 2;
    const Seen all = seen(layer, b, some.first / groups, chunk).with(seen(layer, b, (some.last - 1) / groups, chunk));
    if (all.begin >= all.end) {
      for (int64_t i = 0; i < n; i++) parts[i * of_one + hd + 1] = 0;
      return;
    }
    alignas(64) char encoded[TOGETHER * (4 * MOST_HEAD_DIM + 64)];
    alignas(64) float scores[TOGETHER * CHUNK];
    const auto query = [&](int64_t i) {
      return qkv + query_row(b, some.first + i) * width + query_head(kv, some.first + i) * hd;
    };
    const int64_t start = chunk * CHUNK, first = all.begin / LANES * LANES, end = (all.end + LANES - 1) / LANES * LANES;
    const char *keys = slot(index, 0, b, kv, first);
    const int64_t next = to_next_chunk(layer, b, kv, chunk);
    const float scale = 1.0f / std::sqrt((float)hd);
    float *from_first = scores + (first - start);
    if constexpr (KIND == INT8) {
      const int64_t tile = LANES * m.position_bytes(), panels = (end - first) / LANES;
      for (int64_t i = 0; i < n; i++) encode_digits(query(i), hd, encoded + i * digits_stride(hd));
      multiply_codes({keys, hd, tile, LANES * 4, LANES * 16, next}, panels, encoded, n, from_first, CHUNK);
      scale_positions(keys, panels, n, scale, from_first);
    } else {
      const int64_t stride = input_stride(KIND, hd);
      for (int64_t i = 0; i < n; i++) {
        const float *q = query(i);
        encode(KIND, hd, 0, hd, encoded + i * stride, [=](int64_t k) { return load<Vec>(q + k); });
      }
      const Matrix matrix{KIND, 1.0f, end - first, hd, keys};
      multiply_near<KIND>(matrix, (end - first) / LANES, encoded, n, {from_first, CHUNK, matrix.out, false, scale, nullptr});
    }
    if (next) fetch_keys(keys + next);  // at once, which is faster than during the product
    // Values are read in whole pairs or tiles of positions: masked positions have the weight 0.
    const Seen whole{all.begin / PAIRED * PAIRED - start, (all.end + PAIRED - 1) / PAIRED * PAIRED - start};
    const char *values = slot(index, 1, b, kv, start);
    constexpr int64_t of_query = weights_of<KIND>();
    alignas(64) float rounded[of_query < CHUNK ? TOGETHER * of_query : 1];
    float *weights = of_query < CHUNK ? rounded : scores;
    for (int64_t i = 0; i < n; i++)
      soften<KIND>(scores + i * CHUNK, weights + i * of_query, whole,
                   seen(layer, b, (some.first + i) / groups, chunk).from(start), parts + i * of_one + hd);
    if constexpr (KIND == INT8) {
      const int64_t tile = LANES * m.position_bytes(), positions = whole.end - whole.begin;
      const char *from = values + whole.begin * m.position_bytes();
      scale_positions(from, positions / LANES, n, 1.0f, scores + whole.begin);
      for (int64_t i = 0; i < n; i++)
        encode_digits(scores + i * CHUNK + whole.begin, positions, encoded + i * digits_stride(positions));
      multiply_codes({from, positions, LANES * 4, hd * 4, tile, next}, hd / LANES, encoded, n, parts, of_one);
    } else {
#ifdef MATRIX_UNIT
      if (KIND == BFLOAT16 && has_matrix_unit()) {
        const Tiled tiled{values + whole.begin * hd * 2, LANES * 4, PAIRED * hd * 2, hd * 4};
        return product_in_tiles(tiled, 0, hd / LANES, (whole.end - whole.begin) / DEEP,
                                (const char *)(rounded + whole.begin / 2), CHUNK * 2, n, {parts, of_one, hd, false, 1.0f, nullptr});
      }
#endif
      for (int64_t i = 0; i < n; i += QUERIES)
        weigh_values<KIND, QUERIES>(values, whole, next, n - i, weights + i * of_query, parts + i * of_one);
    }
  }

  // Multiplies scores or weights of positions in int8 by their scales, from the tile of the first one on.
  void scale_positions(const char *tile, int64_t panels, int64_t n, float scale, float *scores) const {
    for (int64_t p = 0; p < panels; p++, tile += LANES * m.position_bytes())
      for (int64_t k = 0; k < LANES; k += WIDTH) {
        const Vec factor = load<Vec>(scales_of(tile, m.head_dim) + k) * scale;
        for (int64_t i = 0; i < n; i++) {
          float *at = scores + i * CHUNK + p * LANES + k;
          store<Vec>(at, load<Vec>(at) * factor);
        }
      }
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
  void weigh_values(const char *values, Seen whole, int64_t next, int64_t n, const float *weights, float *parts) const {
    if constexpr (Q > 0) {
      if (n < Q) return weigh_values<KIND, Q - 1>(values, whole, next, n, weights, parts);
      weigh_outputs<KIND, Q, outputs_of(Q)>(values, whole, next, weights, parts, 0);
    }
  }

  // For Q queries, all output vectors from one on, in tiles of nearly equal width.
  template <int KIND, int Q, int N>
  void weigh_outputs(const char *values, Seen whole, int64_t next, const float *weights, float *parts,
                     int64_t first) const {
    if constexpr (N > 0) {
      for (int64_t left = m.head_dim / WIDTH - first; left > 0; left -= N, first += N) {
        const int64_t tiles = (left + outputs_of(Q) - 1) / outputs_of(Q);
        if ((left + tiles - 1) / tiles < N)
          return weigh_outputs<KIND, Q, N - 1>(values, whole, next, weights, parts, first);
        weigh<KIND, Q, N>(values, whole, next, first * WIDTH, weights, parts);
      }
    }
  }

  // For Q queries, N output vectors
  template <int KIND, int Q, int N>
  void weigh(const char *values, Seen whole, int64_t next, int64_t k, const float *weights, float *parts) const {
    // With accumulators in all registers, pairs are read twice, as in `multiply`.
    constexpr bool full = Q * N == TILES;
    Vec sums[Q][N];
#pragma GCC unroll 16
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 16
      for (int j = 0; j < N; j++) sums[i][j] = Vec{};
    for (int64_t s = whole.begin; s < whole.end; s += 2) {
      const char *at = values + (s * m.head_dim + (KIND == FLOAT32 ? k : 2 * k)) * (KIND == FLOAT32 ? 4 : 2);
#pragma GCC unroll 16
      for (int j = 0; j < N; j += PARTS) {
        __builtin_prefetch(at + next + j * WIDTH * 4, 0, 2);
        if constexpr (KIND == FLOAT32) __builtin_prefetch(at + next + m.head_dim * 4 + j * WIDTH * 4, 0, 2);
      }
#ifdef PAIRS_OF_BFLOAT16
      if constexpr (KIND == BFLOAT16) {
        Words pairs[N];
#pragma GCC unroll 16
        for (int j = 0; j < N; j++) {
          pairs[j] = load<Words>(at + j * WIDTH * 4);
          asm("" : "+v"(pairs[j]));  // else each query loads them again
        }
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
inline void encode_normed(const Linear &w, const float *norm, float eps, const float *x, int64_t rows,
                          char *inputs, int thread, int threads) {
  const Share mine = share(rows, thread, threads);
  for (int64_t row = mine.first; row < mine.last; row++) {
    char *to = inputs + row * input_stride(w.kind(), w.in);
    encode(w.kind(), w.in, 0, w.in, to, normed(x + row * w.in, norm, w.in, eps));
  }
}

// ---- argmax -------------------------------------------------------------------------------------

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
  in_parallel(threads, [&](Team &team, int thread, int size) {
    Pass pass{*m, x, sequences, batch, rows, sequence_of.get(), team, thread, size,
              qkv.get(), attended.get(), gate_up.get(), projected.get(), few, inputs.get(), gated.get()};
    for (int64_t layer = start; layer < stop; layer++) {
      pass.run(m->layers[layer], layer);
      pass.threads = team.remaining(pass.threads);
      if (thread >= pass.threads) return;
    }
  });
}

// The sequences of a batch in one cache, [L, 2, B, KV heads, capacity, head_dim].
struct Even {
  Even(const Model *m, const int64_t *lengths, int64_t batch, int64_t positions, void *slots, int64_t capacity,
       const float *const *turns)
      : sequences(batch) {
    const int64_t of_one = m->kv_heads * capacity * m->position_bytes();
    for (int64_t b = 0; b < batch; b++)
      sequences.get()[b] = {lengths[b], positions, (char *)slots + b * of_one, capacity, batch * of_one, turns, 0, 0, nullptr};
  }
  Buffer<Sequence> sequences;
};

void product(const Linear *w, const float *norm, float eps, const float *x, int64_t rows, float *out,
             int threads) {
  const Buffer<char> inputs(rows * input_stride(w->kind(), w->in));
  in_parallel(threads, [&](Team &team, int thread, int size) {
    encode_normed(*w, norm, eps, x, rows, inputs.get(), thread, size);
    team.wait(size);
    const Share mine = share((w->out + LANES - 1) / LANES, thread, size);
    multiply(*w, mine.first, mine.last, inputs.get(), rows, out, w->out);
  });
}

// Blocks of outputs that are reduced while they are in L1 or L2.
constexpr int64_t NEAR = 512;
inline int64_t blocks_of(const Linear &w) { return (w.out + NEAR - 1) / NEAR; }

void choose(const Linear *const *heads, int64_t n_heads, const float *norm, float eps, const float *x, int64_t rows,
            int64_t *chosen, float *probabilities, int threads) {
  const Buffer<char> inputs(rows * input_stride(heads[0]->kind(), heads[0]->in));
  const Buffer<float> some(threads * rows * NEAR), tops(threads * rows);
  int64_t n_blocks = 0;
  for (int64_t head = 0; head < n_heads; head++) n_blocks += blocks_of(*heads[head]);
  const Buffer<Best> every(n_blocks * rows);  // merged in their order: the same sums for any number of threads
  in_parallel(threads, [&](Team &team, int thread, int size) {
    encode_normed(*heads[0], norm, eps, x, rows, inputs.get(), thread, size);
    team.wait(size);
    float *outputs = some.get() + thread * rows * NEAR, *top = tops.get() + thread * rows;
    for (int64_t row = 0; row < rows; row++) top[row] = -INFINITY;
    Best *best = every.get();
    for (int64_t head = 0; head < n_heads; best += blocks_of(*heads[head++]) * rows) {
      const Matrix &w = *heads[head]->parts;
      const Share mine = share(blocks_of(*heads[head]), thread, size);
      for (int64_t block = mine.first; block < mine.last; block++) {
        const int64_t first = block * NEAR, n = w.out - first < NEAR ? w.out - first : NEAR;
        const Matrix from = from_panel(w, first / LANES);
        multiply(from, 0, (n + LANES - 1) / LANES, inputs.get(), rows, {outputs, NEAR, from.out, false, w.scale, from.bias});
        for (int64_t row = 0; row < rows; row++) {
          const Best next = best[block * rows + row] = best_of(outputs + row * NEAR, n, probabilities != nullptr, top[row]);
          top[row] = next.top > top[row] ? next.top : top[row];
        }
      }
    }
    team.wait(size);
    const Share mine = share(rows, thread, size);
    for (int64_t row = mine.first; row < mine.last; row++) {
      Best total;
      const Best *next = every.get() + row;
      for (int64_t head = 0, before = 0; head < n_heads; before += heads[head++]->out)
        for (int64_t block = 0; block < blocks_of(*heads[head]); block++, next += rows)
          total.take(*next, before + block * NEAR);
      chosen[row] = total.at;
      if (probabilities) probabilities[row] = 1.0f / total.total;
    }
  });
}

// Dequantizes rows of a matrix. Returns whether all indices are inside.
bool look_up(const Matrix &w, const int64_t *index, int64_t n, float *out) {
  const int64_t in = w.in;
  for (int64_t i = 0; i < n; i++)
    if (index[i] < 0 || index[i] >= w.out) return false;
  for (int64_t i = 0; i < n; i++) {
    const int64_t panel = index[i] / LANES, lane = index[i] % LANES;
    float *to = out + i * in;
    if (w.kind == FLOAT32) {
      for (int64_t k = 0; k < in; k++) to[k] = ((const float *)w.data)[(panel * in + k) * LANES + lane];
    } else if (w.kind == BFLOAT16) {
      for (int64_t k = 0; k < in; k++) {
        const uint32_t bits = ((const uint16_t *)w.data)[((panel * in / 2 + k / 2) * LANES + lane) * 2 + k % 2];
        const uint32_t widened = bits << 16;
        memcpy(to + k, &widened, 4);
      }
    } else {
      const int scaled = scaled_inputs(w.kind), centre = w.offsets ? 0 : centre_of(w.kind);
      for (int64_t k = 0; k < in; k++) {
        const int64_t group = panel * in / GROUP + k / GROUP, scales = (panel * in + k) / scaled;
        const uint32_t *words = (const uint32_t *)w.data + group * bits_of(w.kind) * LANES;
        const float scale = grid(w.kind, w.scales, w.factors, scales, lane);
        to[k] = (code_of(w.kind, words, lane, k % GROUP) - centre) * scale;
        if (w.offsets) to[k] += grid(w.kind, w.offsets, w.offset_factors, scales, lane);
      }
    }
  }
  return true;
}

// When a draft ends: `DraftRule` of draft_rule.py.
struct Rule {
  double rate, mean, head, overhead, survival;
  const double *acceptance, *costs;  // costs: of the tokens that may still be drafted
  const int64_t *ends;
  int64_t bins, n_ends, limit, lookahead;
  int64_t scored, kept;  // results: tokens that were chosen, and how many of them belong to the draft

  double value_of(double survives, int64_t n) const {
    double value = 0, best = 0;
    const double first = survives - rate * (costs[n] - head);
    for (int64_t i = n + 1; i < limit && i <= n + lookahead; i++) {
      survives *= mean;
      value += survives - rate * costs[i];
      best = value > best ? value : best;
    }
    return first + best;
  }

  bool has_ended(const int64_t *chosen) const {
    if (kept == limit) return true;
    for (int64_t i = 0; kept && i < n_ends; i++)
      if (chosen[kept - 1] == ends[i]) return true;
    return value_of(survival * mean, kept) - rate * (kept ? head : head + overhead) <= 0;
  }

  // Returns whether the token that was chosen last is kept.
  bool keeps(float probability) {
    const int64_t bin = probability > 0 ? (int64_t)(probability * (double)bins) : 0;
    survival *= acceptance[bin < bins ? bin : bins - 1];
    scored++;
    if (value_of(survival, kept) < 0) return false;
    kept++;
    return true;
  }
};

// Writes a and b side by side, each scaled to a root mean square of 1.
void join(const float *a, const float *b, int64_t n, float eps, float *to) {
  const float *const rows[] = {a, b};
  for (const float *from : rows) {
    const float factor = norm_factor(from, n, eps);
    for (int64_t k = 0; k < n; k++) *to++ = from[k] * factor;
  }
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
int layerskip_product(const Linear *w, const float *norm, float eps, const float *x, int64_t rows,
                       float *out, int threads) {
  return status_of([=] { product(w, norm, eps, x, rows, out, threads); });
}

// The argmax (the first) of each row and its softmax probability (or null) of norm(x) times heads of one matrix
// each, all in the same format, whose outputs are numbered consecutively.
int layerskip_choose(const Linear *const *heads, int64_t n_heads, const float *norm, float eps, const float *x,
                      int64_t rows, int64_t *chosen, float *probabilities, int threads) {
  return status_of([=] { choose(heads, n_heads, norm, eps, x, rows, chosen, probabilities, threads); });
}

// One step: positions of each sequence through layers [start, stop), then the argmax of the exit's outputs for all
// rows but the first `unscored`, and its softmax probability (or null). With an embedding, tokens are looked up first,
// which fills in the hidden states; returns 2 for a token outside of the vocabulary.
int layerskip_step(const Model *m, const Linear *embedding, const int64_t *tokens, float *hidden, float *x,
                    const int64_t *lengths, int64_t batch, int64_t positions, int64_t start, int64_t stop, void *slots,
                    int64_t capacity, const float *const *turns, int64_t unscored, const Linear *const *heads,
                    int64_t n_heads, const float *norm, int64_t *chosen, float *probabilities, int threads) {
  return status_of([=] {
    if (embedding && !look_up(*embedding->parts, tokens, batch * positions, hidden)) return 2;
    const Even even(m, lengths, batch, positions, slots, capacity, turns);
    run(m, hidden, x, even.sequences.get(), batch, start, stop, threads);
    const int64_t rows = batch * positions - unscored;
    choose(heads, n_heads, norm, m->eps, x + unscored * m->hidden, rows, chosen, probabilities, threads);
    return 0;
  });
}

// Drafts at least one token, and further ones until the rule ends the draft: runs `positions` rows through layers
// [0, layers), takes the argmax of the exit's outputs, and goes on with the row of this token. `token_ids` (or null)
// has the token of each output. `hidden` and `x` also have a row for each token that may be drafted.
// An early exit is given tokens, which are looked up in the embedding; its layers run over all tokens that are kept.
// An exit adapter (with a projection) is given states instead: `embedded`, and `previous` of one position back; its
// layers do not run over the last token.
int layerskip_draft(const Model *m, const Linear *embedding, const int64_t *tokens, const Linear *projection, float eps,
                     const float *embedded, const float *previous, float *hidden, float *x, int64_t length,
                     int64_t positions, int64_t layers, void *slots, int64_t capacity, const float *const *turns,
                     const Linear *const *heads, int64_t n_heads, const float *norm, const int64_t *token_ids,
                     Rule *rule, int64_t *chosen, float *probabilities, int threads) {
  return status_of([=] {
    const int64_t width = m->hidden;
    if (tokens && !look_up(*embedding->parts, tokens, positions, hidden)) return 2;
    const Buffer<float> joined(projection ? positions * 2 * width : 0), looked_up(width);
    const auto project = [&](const float *states, const float *before, int64_t rows, float *to) {
      for (int64_t row = 0; row < rows; row++)
        join(states + row * width, before + row * width, width, eps, joined.get() + row * 2 * width);
      product(projection, nullptr, 0, joined.get(), rows, to, threads);
    };
    if (projection) project(embedded, previous, positions, hidden);
    float *entering = hidden, *leaving = x;
    for (int64_t before = length, rows = positions;; before += rows, rows = 1) {
      const Even even(m, &before, 1, rows, slots, capacity, turns);
      run(m, entering, leaving, even.sequences.get(), 1, 0, layers, threads);
      entering += rows * width, leaving += rows * width;
      if (rule->kept && !projection && rule->has_ended(chosen)) return 0;
      const float *last = leaving - width;
      int64_t *token = chosen + rule->kept;
      float *probability = probabilities + rule->kept;
      choose(heads, n_heads, norm, m->eps, last, 1, token, probability, threads);
      if (token_ids) *token = token_ids[*token];
      if (!rule->keeps(*probability)) return 0;
      if (projection && rule->has_ended(chosen)) return 0;
      look_up(*embedding->parts, token, 1, projection ? looked_up.get() : entering);
      if (projection) project(looked_up.get(), last, 1, entering);
    }
  });
}

// out [n, w.in]: rows of the matrix, as of an embedding. Returns whether all indices are inside.
int layerskip_rows(const Linear *w, const int64_t *index, int64_t n, float *out) {
  return look_up(*w->parts, index, n, out);
}

// Packs rows of blocks into panels of words of `bits` bits.
void layerskip_pack(const Blocks *format, int bits, const uint8_t *data, int64_t rows, int64_t in, uint32_t *packed,
                    int threads) {
  const int64_t stride = in / format->weights * format->bytes;
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; row += LANES)
    pack_panel(*format, bits, data + row * stride, rows - row < LANES ? rows - row : LANES, in, packed + row * in * bits / 32);
}

// The processors that this process may run on; a thread that OpenMP has bound to one would see that one alone.
int layerskip_processors() { return omp_get_num_procs(); }
}
