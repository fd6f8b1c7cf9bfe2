// Causal attention of bfloat16 rows on a CPU, in blocks whose scores stay in a core's cache. model/flash_cpu.py loads it.
//
// The method is FlashAttention 2 (Dao, 2023): a block of queries meets a block of keys, exponentials are taken against a
// running maximum, and the backward forms the probabilities again from the log-sum-exp. Pairs of tokens may meet in two
// regions, near and far, each with queries and keys of its own: one running maximum serves both, so nothing is merged.
//
// Every product is `multiply`: it takes two bfloat16 numbers at a time and adds up in float32. Scores are therefore float32,
// as with torch's fused kernel. Loops over vectors are written with the vectors of GCC and Clang, whatever the processor.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 16;     // float32 numbers of a vector
constexpr int64_t QUERIES = 64;   // rows of a block of scores
constexpr int64_t KEYS = 128;     // its columns: 32 KiB of scores
constexpr float HIDDEN = -1e30f;  // a score that is not seen; finite, so that two of them can be subtracted
constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.69314718055994531f;

using bf16 = uint16_t;
using pair = uint32_t;  // two bfloat16 numbers, the first in the lower half
typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

template <class V, class T>
inline V load(const T* p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

template <class V, class T>
inline void store(T* p, V x) {
    std::memcpy(p, &x, sizeof x);
}

inline floats at(const float* p) { return load<floats>(p); }

inline words bits(const bf16* p) { return __builtin_convertvector(load<halves>(p), words); }

inline floats wide(const bf16* p) { return (floats)(bits(p) << 16); }

inline words rounded(floats x) {  // to the nearest bfloat16, ties to even, in the upper half of each word
    const words all = (words)x;
    return all + 0x7fff + ((all >> 16) & 1);
}

inline void narrow(bf16* p, floats x) { store(p, __builtin_convertvector(rounded(x) >> 16, halves)); }

inline words paired(floats first, floats second) { return (rounded(first) >> 16) | (rounded(second) & 0xffff0000u); }

inline float sum(floats x) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += x[lane];
    return total;
}

inline float largest(floats x) {
    float most = x[0];
    for (int lane = 1; lane < LANES; lane++) most = std::max(most, x[lane]);
    return most;
}

// sums + a b over both numbers of every pair
inline floats dot(floats sums, words a, words b) {
#ifdef __AVX512BF16__
    return (floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    sums += (floats)(a << 16) * (floats)(b << 16);
    return sums + (floats)(a & 0xffff0000u) * (floats)(b & 0xffff0000u);
#endif
}

// 2^x for x <= 0, to 3e-7 of it; 0 where that is no normal number
inline floats exp2(floats x) {
    const floats magic = floats{} + 12582912.0f;  // adding it leaves whole numbers
    const floats whole = (x + magic) - magic, rest = x - whole;
    floats p = rest * 1.3333558146e-3f + 9.6181291076e-3f;
    p = p * rest + 5.5504108664e-2f;
    p = p * rest + 2.4022650696e-1f;
    p = p * rest + 6.9314718056e-1f;
    p = p * rest + 1.0f;
    const ints scaled = (ints)p + (__builtin_convertvector(whole, ints) << 23);
    return x > -126.0f ? (floats)scaled : floats{};
}

// Pairs of a left factor: a[row * row_step + k * pair_step].
struct Left {
    const pair* a;
    int64_t row_step, pair_step;
};

// Pairs of a right factor: b[k * step + column].
struct Right {
    const pair* b;
    int64_t step;
};

template <int ROWS, int VECTORS>
inline void tile(Left left, Right right, int64_t count, float* out, int64_t step, bool add) {
    floats sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int c = 0; c < VECTORS; c++) sums[r][c] = add ? at(out + r * step + c * LANES) : floats{};
    for (int64_t k = 0; k < count; k++) {
        words columns[VECTORS];
#pragma GCC unroll 8
        for (int c = 0; c < VECTORS; c++) columns[c] = load<words>(right.b + k * right.step + c * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const words row = words{} + left.a[r * left.row_step + k * left.pair_step];
#pragma GCC unroll 8
            for (int c = 0; c < VECTORS; c++) sums[r][c] = dot(sums[r][c], row, columns[c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int c = 0; c < VECTORS; c++) store(out + r * step + c * LANES, sums[r][c]);
}

template <int VECTORS>
void strip(Left left, Right right, int64_t count, float* out, int64_t step, int64_t rows, bool add) {
    int64_t r = 0;
    auto rest = [&] { return Left{left.a + r * left.row_step, left.row_step, left.pair_step}; };
    for (; r + 6 <= rows; r += 6) tile<6, VECTORS>(rest(), right, count, out + r * step, step, add);
    for (; r + 2 <= rows; r += 2) tile<2, VECTORS>(rest(), right, count, out + r * step, step, add);
    for (; r < rows; r++) tile<1, VECTORS>(rest(), right, count, out + r * step, step, add);
}

// out[rows, columns] = left right, or += where `add`; `count` pairs are summed; columns are a multiple of LANES.
void multiply(Left left, Right right, int64_t count, float* out, int64_t step, int64_t rows, int64_t columns, bool add) {
    int64_t c = 0;
    for (; c + 4 * LANES <= columns; c += 4 * LANES)
        strip<4>(left, {right.b + c, right.step}, count, out + c, step, rows, add);
    for (; c < columns; c += LANES) strip<1>(left, {right.b + c, right.step}, count, out + c, step, rows, add);
}

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// One head of the tokens of a document: [length, width], `step` numbers from token to token; zero beyond the end.
struct Head {
    bf16* data;
    int64_t step, length, width;

    bf16* row(int64_t token) const { return data + token * step; }

    Left left(int64_t from) const { return {(const pair*)row(from), step / 2, 1}; }

    // Pairs along the width, transposed: [width / 2, count].
    void pack_columns(int64_t from, int64_t count, pair* out) const {
        for (int64_t t = 0; t < count; t++)
            for (int64_t w = 0; w < width / 2; w++) {
                pair both = 0;
                if (from + t < length) std::memcpy(&both, row(from + t) + 2 * w, sizeof both);
                out[w * count + t] = both;
            }
    }

    // Pairs along the tokens: [count / 2, width].
    void pack_rows(int64_t from, int64_t count, pair* out) const {
        for (int64_t t = from; t < from + count; t += 2)
            for (int64_t w = 0; w < width; w += LANES) {
                const words first = t < length ? bits(row(t) + w) : words{};
                const words second = t + 1 < length ? bits(row(t + 1) + w) : words{};
                store(out + (t - from) / 2 * width + w, first | (second << 16));
            }
    }

    void write(const float* from) const {
        for (int64_t t = 0; t < length; t++)
            for (int64_t w = 0; w < width; w += LANES) narrow(row(t) + w, at(from + t * width + w));
    }
};

// Queries and keys of the pairs with low <= i - j < high.
struct Region {
    Head q, k;
    int64_t low, high;

    // First block of keys that queries from `from` on may see, and the end of the keys that the last of `rows` sees.
    int64_t first_key(int64_t from) const { return std::max<int64_t>(0, from - high + 1) / KEYS * KEYS; }
    int64_t end_key(int64_t from, int64_t rows) const { return std::max<int64_t>(0, from + rows - low); }

    // First block of queries that see keys from `from` on, and the end of those that see any of a block.
    int64_t first_query(int64_t from) const { return (from + low) / QUERIES * QUERIES; }
    int64_t end_query(int64_t from) const { return std::min(q.length, high < q.length ? from + KEYS - 1 + high : q.length); }
};

struct Block {
    int64_t i, j, rows, columns;  // first query and key, and how many
};

// Scores of a block times `factor`; hidden where the region does not reach.
void score(const Region& region, const Block& block, const pair* keys, float factor, float* scores) {
    multiply(region.q.left(block.i), {keys, KEYS}, region.q.width / 2, scores, KEYS, block.rows, block.columns, false);
    const ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t r = 0; r < block.rows; r++)
        for (int64_t c = 0; c < block.columns; c += LANES) {
            floats x = at(scores + r * KEYS + c) * factor;
            const int64_t distance = block.i + r - block.j - c;  // of the first lane; each further one is a token nearer
            if (distance - LANES + 1 < region.low || distance >= region.high) {
                const ints nearer = ints{} + (int32_t)distance - lanes;
                const int32_t high = (int32_t)std::min<int64_t>(region.high, INT32_MAX);
                x = nearer >= (int32_t)region.low && nearer < high ? x : floats{} + HIDDEN;
            }
            store(scores + r * KEYS + c, x);
        }
}

// The running softmax of a block of queries: sums of values against the largest score so far.
struct Softmax {
    int64_t width;
    std::vector<float> sums;
    std::vector<bf16> p;
    float most[QUERIES], total[QUERIES];

    explicit Softmax(int64_t width) : width(width), sums(QUERIES * width), p(QUERIES * KEYS) {}

    void start() {
        std::fill(sums.begin(), sums.end(), 0.0f);
        std::fill(most, most + QUERIES, HIDDEN);
        std::fill(total, total + QUERIES, 0.0f);
    }

    void add(const Block& block, const float* scores, const pair* values) {
        for (int64_t r = 0; r < block.rows; r++) {
            const float* row = scores + r * KEYS;
            floats top = at(row), part = {};
            for (int64_t c = LANES; c < block.columns; c += LANES) top = at(row + c) > top ? at(row + c) : top;
            const float before = most[r];
            most[r] = std::max(before, largest(top));
            for (int64_t c = 0; c < block.columns; c += LANES) {
                const floats chance = exp2(at(row + c) - most[r]);
                part += chance;
                narrow(p.data() + r * KEYS + c, chance);
            }
            const float shrink = std::exp2(before - most[r]);
            total[r] = total[r] * shrink + sum(part);
            float* own = sums.data() + r * width;
            if (shrink != 1.0f)
                for (int64_t w = 0; w < width; w += LANES) store(own + w, at(own + w) * shrink);
        }
        const Left left{(const pair*)p.data(), KEYS / 2, 1};
        multiply(left, {values, width}, block.columns / 2, sums.data(), width, block.rows, width, true);
    }
};

}  // namespace

// Tensors are [tokens, heads, size] and whole; boundaries [documents + 1] cut the tokens. model/flash_cpu.py has the same fields.
struct Sizes {
    int64_t documents, heads, key_heads, width, value_width, window;  // window 0: none
    float scale;
};

namespace {

// What one document and head needs. Without far queries a window hides what is beyond it.
struct Task {
    Sizes z;
    int64_t start, length, kv;

    Task(const Sizes& z, const int64_t* boundaries, int64_t document, int64_t kv)
        : z(z), start(boundaries[document]), length(boundaries[document + 1] - start), kv(kv) {}

    Head head(const bf16* x, int64_t heads, int64_t head, int64_t width) const {
        return {const_cast<bf16*>(x) + (start * heads + head) * width, heads * width, length, width};
    }
    Head of_query(const bf16* x, int64_t n, int64_t width) const { return head(x, z.heads, n, width); }
    Head of_key(const bf16* x, int64_t width) const { return head(x, z.key_heads, kv, width); }

    std::vector<Region> regions(const bf16* const* q, const bf16* const* k, int64_t n) const {
        const int64_t all = INT64_MAX / 2;
        std::vector<Region> found = {{of_query(q[0], n, z.width), of_key(k[0], z.width), 0, z.window ? z.window : all}};
        if (q[1] && z.window < length) found.push_back({of_query(q[1], n, z.width), of_key(k[1], z.width), z.window, all});
        return found;
    }
};

}  // namespace

// q, k: near and far, the latter may be null. out [tokens, heads, value_width], lse [tokens, heads].
extern "C" void attention_forward(const Sizes* sizes, const int64_t* boundaries, const bf16* const* q, const bf16* const* k,
                                  const bf16* v, bf16* out, float* lse) {
    const Sizes z = *sizes;
    const int64_t H = z.width, W = z.value_width;
#pragma omp parallel for schedule(dynamic)
    for (int64_t index = 0; index < z.documents * z.heads; index++) {
        const int64_t n = index % z.heads;
        const Task task(z, boundaries, index / z.heads, n / (z.heads / z.key_heads));
        const auto regions = task.regions(q, k, n);
        const Head values = task.of_key(v, W), result = task.of_query(out, n, W);
        const int64_t length = task.length, padded = up(length, KEYS);
        std::vector<pair> packed_k(regions.size() * padded * H / 2), packed_v(padded * W / 2);
        for (size_t part = 0; part < regions.size(); part++)
            for (int64_t j = 0; j < length; j += KEYS)
                regions[part].k.pack_columns(j, KEYS, packed_k.data() + (part * padded + j) * H / 2);
        values.pack_rows(0, padded, packed_v.data());
        std::vector<float> scores(QUERIES * KEYS);
        Softmax softmax(W);
        for (int64_t i = 0; i < length; i += QUERIES) {
            const int64_t rows = std::min(QUERIES, length - i);
            softmax.start();
            for (size_t part = 0; part < regions.size(); part++) {
                const Region& region = regions[part];
                const int64_t end = region.end_key(i, rows);
                for (int64_t j = region.first_key(i); j < end; j += KEYS) {
                    const Block block{i, j, rows, std::min(KEYS, up(end - j, LANES))};
                    score(region, block, packed_k.data() + (part * padded + j) * H / 2, z.scale * LOG2E, scores.data());
                    softmax.add(block, scores.data(), packed_v.data() + j * W / 2);
                }
            }
            for (int64_t r = 0; r < rows; r++) {
                const float* sums = softmax.sums.data() + r * W;
                for (int64_t w = 0; w < W; w += LANES) narrow(result.row(i + r) + w, at(sums + w) / softmax.total[r]);
                lse[(task.start + i + r) * z.heads + n] = (softmax.most[r] + std::log2(softmax.total[r])) * LN2;
            }
        }
    }
}

// dq, dk: near and far, as q and k. Query heads that share a key head are one task, so nothing is written twice.
extern "C" void attention_backward(const Sizes* sizes, const int64_t* boundaries, const bf16* const* q, const bf16* const* k,
                                   const bf16* v, const bf16* out, const float* lse, const bf16* grad, bf16* const* dq,
                                   bf16* const* dk, bf16* dv) {
    const Sizes z = *sizes;
    const int64_t H = z.width, W = z.value_width, group = z.heads / z.key_heads;
#pragma omp parallel for schedule(dynamic)
    for (int64_t index = 0; index < z.documents * z.key_heads; index++) {
        const Task task(z, boundaries, index / z.key_heads, index % z.key_heads);
        const int64_t length = task.length, padded = up(length, KEYS);
        const Head values = task.of_key(v, W);
        std::vector<pair> columns_k(KEYS * H / 2), rows_k(KEYS * H / 2), columns_v(KEYS * W / 2);
        std::vector<pair> rows_q(padded * H / 2), rows_grad(padded * W / 2), p(QUERIES / 2 * KEYS), ds(QUERIES / 2 * KEYS);
        std::vector<bf16> ds_rows(QUERIES * KEYS);
        std::vector<float> scores(QUERIES * KEYS), dp(QUERIES * KEYS), delta(padded), level(padded);
        std::vector<float> sum_q(padded * H), sum_k[2], sum_v(padded * W);
        for (auto& sums : sum_k) sums.assign(q[1] || &sums == sum_k ? padded * H : 0, 0.0f);
        for (int64_t n = task.kv * group; n < (task.kv + 1) * group; n++) {
            const auto regions = task.regions(q, k, n);
            const Head outer = task.of_query(grad, n, W), result = task.of_query(out, n, W);
            outer.pack_rows(0, padded, rows_grad.data());
            for (int64_t i = 0; i < length; i++) {
                floats product = {};
                for (int64_t w = 0; w < W; w += LANES) product += wide(result.row(i) + w) * wide(outer.row(i) + w);
                delta[i] = sum(product);
                level[i] = lse[(task.start + i) * z.heads + n] * LOG2E;
            }
            for (size_t part = 0; part < regions.size(); part++) {
                const Region& region = regions[part];
                region.q.pack_rows(0, padded, rows_q.data());
                std::fill(sum_q.begin(), sum_q.end(), 0.0f);
                for (int64_t j = 0; j < length; j += KEYS) {
                    region.k.pack_columns(j, KEYS, columns_k.data());
                    region.k.pack_rows(j, KEYS, rows_k.data());
                    values.pack_columns(j, KEYS, columns_v.data());
                    for (int64_t i = region.first_query(j), end = region.end_query(j); i < end; i += QUERIES) {
                        const int64_t rows = std::min(QUERIES, length - i), even = up(rows, 2);
                        const Block block{i, j, rows, std::min(KEYS, up(region.end_key(i, rows) - j, LANES))};
                        score(region, block, columns_k.data(), z.scale * LOG2E, scores.data());
                        multiply(outer.left(i), {columns_v.data(), KEYS}, W / 2, dp.data(), KEYS, rows, block.columns, false);
                        for (int64_t r = 0; r < even; r += 2)
                            for (int64_t c = 0; c < block.columns; c += LANES) {
                                floats chance[2] = {}, slope[2] = {};
                                for (int64_t one = 0; one < std::min<int64_t>(2, rows - r); one++) {
                                    const int64_t place = (r + one) * KEYS + c, token = i + r + one;
                                    chance[one] = exp2(at(scores.data() + place) - level[token]);
                                    slope[one] = chance[one] * (at(dp.data() + place) - delta[token]) * z.scale;
                                    narrow(ds_rows.data() + place, slope[one]);
                                }
                                store(p.data() + r / 2 * KEYS + c, paired(chance[0], chance[1]));
                                store(ds.data() + r / 2 * KEYS + c, paired(slope[0], slope[1]));
                            }
                        const Right of_grad{rows_grad.data() + i * W / 2, W}, of_q{rows_q.data() + i * H / 2, H};
                        const Left of_ds{(const pair*)ds_rows.data(), KEYS / 2, 1};
                        multiply({p.data(), 1, KEYS}, of_grad, even / 2, sum_v.data() + j * W, W, block.columns, W, true);
                        multiply({ds.data(), 1, KEYS}, of_q, even / 2, sum_k[part].data() + j * H, H, block.columns, H, true);
                        multiply(of_ds, {rows_k.data(), H}, block.columns / 2, sum_q.data() + i * H, H, rows, H, true);
                    }
                }
                task.of_query(dq[part], n, H).write(sum_q.data());
            }
            if (q[1] && regions.size() == 1) {  // a document within the window has no far pairs
                std::fill(sum_q.begin(), sum_q.end(), 0.0f);
                task.of_query(dq[1], n, H).write(sum_q.data());
            }
        }
        for (int part = 0; part < (q[1] ? 2 : 1); part++) task.of_key(dk[part], H).write(sum_k[part].data());
        task.of_key(dv, W).write(sum_v.data());
    }
}
