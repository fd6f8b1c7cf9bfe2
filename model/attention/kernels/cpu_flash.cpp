// Causal attention of bfloat16 rows on a CPU, in blocks whose scores stay in a core's cache. model/attention/kernels/cpu_flash.py loads it.
//
// The method is FlashAttention 2 (Dao, 2023): a block of queries meets a block of keys, exponentials are taken against a
// running maximum, and the backward recomputes the probabilities from the log-sum-exp. Pairs of tokens may meet in two
// regions, near and far, each with queries and keys of its own: one running maximum serves both, so nothing is merged.
//
// Every product is `multiply`: it takes two bfloat16 numbers at a time and adds up in float32. Scores are therefore float32,
// as with torch's fused kernel. Loops over vectors are written with the vectors of GCC and Clang, whatever the processor.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 16;     // float32 numbers of a vector
constexpr int64_t QUERIES = 64;   // rows of a block of scores
constexpr int64_t KEYS = 128;     // its columns: 32 KiB of scores
constexpr int64_t LINE = 32;      // bfloat16 numbers of a cache line
constexpr int64_t AHEAD = 16;     // tokens that a copy asks for before it needs them
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

#ifdef __AVX512BF16__

inline void narrow(bf16* p, floats x) { store(p, _mm512_cvtneps_pbh((__m512)x)); }

inline words paired(floats first, floats second) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    const auto lanes = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                        23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (words)_mm512_permutexvar_epi16(lanes, both);
}

// sums + a b over both numbers of every pair
inline floats dot(floats sums, words a, words b) {
    return (floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}

#else

inline words rounded(floats x) {  // to the nearest bfloat16, ties to even, in the upper half of each word
    const words all = (words)x;
    return all + 0x7fff + ((all >> 16) & 1);
}

inline void narrow(bf16* p, floats x) { store(p, __builtin_convertvector(rounded(x) >> 16, halves)); }

inline words paired(floats first, floats second) { return (rounded(first) >> 16) | (rounded(second) & 0xffff0000u); }

inline floats dot(floats sums, words a, words b) {
    sums += (floats)(a << 16) * (floats)(b << 16);
    return sums + (floats)(a & 0xffff0000u) * (floats)(b & 0xffff0000u);
}

#endif

// One number out of sixteen, by halves.
template <class F>
inline float across(floats x, F join) {
    float lanes[LANES];
    store(lanes, x);
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t lane = 0; lane < half; lane++) lanes[lane] = join(lanes[lane], lanes[lane + half]);
    return lanes[0];
}

inline float sum(floats x) {
    return across(x, [](float a, float b) { return a + b; });
}

inline float largest(floats x) {
    return across(x, [](float a, float b) { return a > b ? a : b; });
}

// 2^x for x <= 0, to 3e-7 of it; 0 where that is no normal number. What is not a number stays so.
inline floats exp2(floats x) {
    const floats magic = floats{} + 12582912.0f;  // adding it leaves whole numbers
    const floats whole = (x + magic) - magic, rest = x - whole;
    floats p = rest * 1.3390863365e-3f + 9.6760319184e-3f;  // interpolates 2^rest at Chebyshev's points of [-1/2, 1/2]
    p = p * rest + 5.5503571142e-2f;
    p = p * rest + 2.4022107485e-1f;
    p = p * rest + 6.9314718803e-1f;
    p = p * rest + 1.0f;
    const ints scaled = (ints)p + (__builtin_convertvector(whole, ints) << 23);
    return x < -126.0f ? floats{} : (floats)scaled;
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

// Memory of a thread, on the boundaries of cache lines: vectors that straddle two load at half the speed.
template <class T>
class Room {
    struct Free {
        void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); }
    };
    std::unique_ptr<T[], Free> data;

   public:
    explicit Room(int64_t count) : data(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t(64)))) {}
    operator T*() const { return data.get(); }
    T* at(int64_t index) const { return data.get() + index; }
    void clear(int64_t count) const { std::memset(data.get(), 0, count * sizeof(T)); }
};

// One head of the tokens of a document: [length, width], `step` numbers from token to token; zero beyond the end.
struct Head {
    bf16* data;
    int64_t step, length, width;

    bf16* row(int64_t token) const { return data + token * step; }

    Left left(int64_t from) const { return {(const pair*)row(from), step / 2, 1}; }

    // The same, copied side by side: tokens far apart miss the cache one by one, and share a few of its sets.
    Head gathered(pair* room) const {
        for (int64_t t = 0; t < length; t++) {
            for (int64_t w = 0; w < width; w += LINE) __builtin_prefetch(row(std::min(t + AHEAD, length - 1)) + w);
            std::memcpy(room + t * width / 2, row(t), width * sizeof(bf16));
        }
        return {(bf16*)room, width, length, width};
    }

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

// Queries and keys of the pairs with low <= i - j < high, for query i and key j. Where there are fewer queries than keys, query 0
// is a later token than key 0, and both bounds may be negative.
struct Region {
    Head q, k;
    int64_t low, high;

    // First block of keys that queries from `from` on may see, and the end of the keys that the last of `rows` sees.
    int64_t first_key(int64_t from) const { return std::max<int64_t>(0, from - high + 1) / KEYS * KEYS; }
    int64_t end_key(int64_t from, int64_t rows) const { return std::max<int64_t>(0, from + rows - low); }

    // First block of queries that see keys from `from` on, and the end of those that see any of a block.
    int64_t first_query(int64_t from) const { return std::max<int64_t>(0, from + low) / QUERIES * QUERIES; }
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
    Room<float> sums;
    Room<bf16> p;
    float most[QUERIES], total[QUERIES];

    explicit Softmax(int64_t width) : width(width), sums(QUERIES * width), p(QUERIES * KEYS) {}

    void start() {
        sums.clear(QUERIES * width);
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
                narrow(p.at(r * KEYS + c), chance);
            }
            const float shrink = std::exp2(before - most[r]);
            total[r] = total[r] * shrink + sum(part);
            float* own = sums.at(r * width);
            if (shrink != 1.0f)
                for (int64_t w = 0; w < width; w += LANES) store(own + w, at(own + w) * shrink);
        }
        const Left left{(const pair*)(bf16*)p, KEYS / 2, 1};
        multiply(left, {values, width}, block.columns / 2, sums, width, block.rows, width, true);
    }
};

// Probabilities of a block and the gradients of its scores, in pairs for the products that follow.
struct Slopes {
    Room<float> scores{QUERIES * KEYS}, dp{QUERIES * KEYS};
    Room<pair> p{QUERIES / 2 * KEYS}, ds{QUERIES / 2 * KEYS};  // pairs of queries
    Room<bf16> ds_rows{QUERIES * KEYS};                        // pairs of keys

    Left of_p() const { return {p, 1, KEYS}; }
    Left of_keys() const { return {ds, 1, KEYS}; }
    Left of_queries() const { return {(const pair*)(bf16*)ds_rows, KEYS / 2, 1}; }

    // From the scores, their log-sum-exp (to base 2), the gradients of the probabilities and their mean for each query.
    void form(const Block& block, const float* level, const float* delta, float scale) const {
        for (int64_t r = 0; r < block.rows; r += 2)
            for (int64_t c = 0; c < block.columns; c += LANES) {
                floats chance[2] = {}, slope[2] = {};
                for (int64_t one = r; one < std::min(r + 2, block.rows); one++) {
                    chance[one - r] = exp2(::at(scores.at(one * KEYS + c)) - level[one]);
                    slope[one - r] = chance[one - r] * (::at(dp.at(one * KEYS + c)) - delta[one]) * scale;
                    narrow(ds_rows.at(one * KEYS + c), slope[one - r]);
                }
                store(p.at(r / 2 * KEYS + c), paired(chance[0], chance[1]));
                store(ds.at(r / 2 * KEYS + c), paired(slope[0], slope[1]));
            }
    }
};

}  // namespace

// Tensors are [tokens, heads, size] and whole. Boundaries [documents + 1] cut the keys of documents, and others their queries,
// which are the last tokens of each; a document may have none. The fields are model/attention/kernels/cpu_flash.py's.
struct Sizes {
    int64_t documents, longest, heads, key_heads, width, value_width, window;  // keys of the longest; window 0: none
    float scale;
};

namespace {

// Where documents begin and end.
struct Boundaries {
    const int64_t *queries, *keys;
};

// What one document and head needs. Without far queries a window hides what is beyond it.
struct Task {
    Sizes z;
    int64_t first_query, queries, first_key, length, kv;  // length: of the document, keys

    Task(const Sizes& z, const Boundaries& cut, int64_t document, int64_t kv)
        : z(z),
          first_query(cut.queries[document]),
          queries(cut.queries[document + 1] - first_query),
          first_key(cut.keys[document]),
          length(cut.keys[document + 1] - first_key),
          kv(kv) {}

    static Head head(const bf16* x, int64_t heads, int64_t head, int64_t width, int64_t start, int64_t length) {
        return {const_cast<bf16*>(x) + (start * heads + head) * width, heads * width, length, width};
    }
    Head of_query(const bf16* x, int64_t n, int64_t width) const { return head(x, z.heads, n, width, first_query, queries); }
    Head of_key(const bf16* x, int64_t width) const { return head(x, z.key_heads, kv, width, first_key, length); }

    std::vector<Region> regions(const bf16* const* q, const bf16* const* k, int64_t n) const {
        const int64_t all = INT64_MAX / 2, earlier = length - queries;
        auto region = [&](int part, int64_t low, int64_t high) {
            return Region{of_query(q[part], n, z.width), of_key(k[part], z.width), low - earlier, high - earlier};
        };
        std::vector<Region> found;
        if (queries) found.push_back(region(0, 0, z.window ? z.window : all));
        if (queries && q[1] && z.window < length) found.push_back(region(1, z.window, all));
        return found;
    }
};

}  // namespace

// q, k: near and far, the latter may be null. out [queries, heads, value_width], lse [queries, heads].
extern "C" void attention_forward(const Sizes* sizes, const int64_t* query_boundaries, const int64_t* boundaries,
                                  const bf16* const* q, const bf16* const* k, const bf16* v, bf16* out, float* lse) {
    const Sizes z = *sizes;
    const Boundaries cut{query_boundaries, boundaries};
    const int64_t H = z.width, W = z.value_width, longest = up(z.longest, KEYS);
#pragma omp parallel
    {
        const Room<pair> packed_k(2 * longest * H / 2), packed_v(longest * W / 2);
        const Room<pair> q_room(2 * longest * H / 2), k_room(longest * H / 2), v_room(longest * W / 2);
        const Room<float> scores(QUERIES * KEYS);
        Softmax softmax(W);
#pragma omp for schedule(dynamic)
        for (int64_t index = 0; index < z.documents * z.heads; index++) {
            const int64_t n = index % z.heads;
            const Task task(z, cut, index / z.heads, n / (z.heads / z.key_heads));
            auto regions = task.regions(q, k, n);
            if (regions.empty()) continue;
            const Head values = task.of_key(v, W).gathered(v_room), result = task.of_query(out, n, W);
            const int64_t length = task.length;
            for (size_t part = 0; part < regions.size(); part++) {
                regions[part].q = regions[part].q.gathered(q_room.at(part * longest * H / 2));
                regions[part].k = regions[part].k.gathered(k_room);
                for (int64_t j = regions[part].first_key(0), end = regions[part].end_key(0, task.queries); j < end; j += KEYS)
                    regions[part].k.pack_columns(j, KEYS, packed_k.at((part * longest + j) * H / 2));
            }
            values.pack_rows(0, up(length, KEYS), packed_v);
            for (int64_t i = 0; i < task.queries; i += QUERIES) {
                const int64_t rows = std::min(QUERIES, task.queries - i);
                softmax.start();
                for (size_t part = 0; part < regions.size(); part++) {
                    const Region& region = regions[part];
                    const int64_t end = region.end_key(i, rows);
                    for (int64_t j = region.first_key(i); j < end; j += KEYS) {
                        const Block block{i, j, rows, std::min(KEYS, up(end - j, LANES))};
                        score(region, block, packed_k.at((part * longest + j) * H / 2), z.scale * LOG2E, scores);
                        softmax.add(block, scores, packed_v.at(j * W / 2));
                    }
                }
                for (int64_t r = 0; r < rows; r++) {
                    const float* sums = softmax.sums.at(r * W);
                    for (int64_t w = 0; w < W; w += LANES) narrow(result.row(i + r) + w, at(sums + w) / softmax.total[r]);
                    lse[(task.first_query + i + r) * z.heads + n] = (softmax.most[r] + std::log2(softmax.total[r])) * LN2;
                }
            }
        }
    }
}

// dq, dk: near and far, as q and k. Query heads that share a key head are one task, so nothing is written twice.
extern "C" void attention_backward(const Sizes* sizes, const int64_t* query_boundaries, const int64_t* boundaries,
                                   const bf16* const* q, const bf16* const* k, const bf16* v, const bf16* out,
                                   const float* lse, const bf16* grad, bf16* const* dq, bf16* const* dk, bf16* dv) {
    const Sizes z = *sizes;
    const Boundaries cut{query_boundaries, boundaries};
    const int64_t H = z.width, W = z.value_width, group = z.heads / z.key_heads, longest = up(z.longest, KEYS);
    const int64_t parts = q[1] ? 2 : 1;
#pragma omp parallel
    {
        const Room<pair> columns_k(KEYS * H / 2), rows_k(KEYS * H / 2), columns_v(KEYS * W / 2);
        const Room<pair> rows_q(longest * H / 2), rows_grad(longest * W / 2), q_room(longest * H / 2), k_room(longest * H / 2);
        const Room<pair> v_room(longest * W / 2), grad_room(longest * W / 2), out_room(longest * W / 2);
        const Room<float> delta(longest), level(longest), sum_q(longest * H), sum_k(parts * longest * H), sum_v(longest * W);
        const Slopes slopes;
#pragma omp for schedule(dynamic)
        for (int64_t index = 0; index < z.documents * z.key_heads; index++) {
            const Task task(z, cut, index / z.key_heads, index % z.key_heads);
            const int64_t padded = up(task.length, KEYS), queries = task.queries, padded_queries = up(queries, KEYS);
            const Head values = task.of_key(v, W).gathered(v_room);
            sum_k.clear(parts * padded * H);
            sum_v.clear(padded * W);
            for (int64_t n = task.kv * group; n < (task.kv + 1) * group; n++) {
                auto regions = task.regions(q, k, n);
                const Head outer = task.of_query(grad, n, W).gathered(grad_room);
                const Head result = task.of_query(out, n, W).gathered(out_room);
                outer.pack_rows(0, padded_queries, rows_grad);
                for (int64_t i = 0; i < queries; i++) {
                    floats product = {};
                    for (int64_t w = 0; w < W; w += LANES) product += wide(result.row(i) + w) * wide(outer.row(i) + w);
                    delta[i] = sum(product);
                    level[i] = lse[(task.first_query + i) * z.heads + n] * LOG2E;
                }
                for (int64_t part = 0; part < parts; part++) {
                    sum_q.clear(padded_queries * H);
                    const bool any = part < (int64_t)regions.size();  // within the window nothing is far
                    const int64_t first_key = any ? regions[part].first_key(0) : 0;
                    const int64_t end_key = any ? regions[part].end_key(0, queries) : 0;
                    if (any) {
                        regions[part].q = regions[part].q.gathered(q_room);
                        regions[part].k = regions[part].k.gathered(k_room);
                        regions[part].q.pack_rows(0, padded_queries, rows_q);
                    }
                    for (int64_t j = first_key; j < end_key; j += KEYS) {
                        const Region& region = regions[part];
                        region.k.pack_columns(j, KEYS, columns_k);
                        region.k.pack_rows(j, KEYS, rows_k);
                        values.pack_columns(j, KEYS, columns_v);
                        for (int64_t i = region.first_query(j), end = region.end_query(j); i < end; i += QUERIES) {
                            const int64_t rows = std::min(QUERIES, queries - i), pairs = (rows + 1) / 2;
                            const Block block{i, j, rows, std::min(KEYS, up(region.end_key(i, rows) - j, LANES))};
                            score(region, block, columns_k, z.scale * LOG2E, slopes.scores);
                            multiply(outer.left(i), {columns_v, KEYS}, W / 2, slopes.dp, KEYS, rows, block.columns, false);
                            slopes.form(block, level.at(i), delta.at(i), z.scale);
                            multiply(slopes.of_p(), {rows_grad.at(i * W / 2), W}, pairs, sum_v.at(j * W), W,
                                     block.columns, W, true);
                            multiply(slopes.of_keys(), {rows_q.at(i * H / 2), H}, pairs, sum_k.at((part * padded + j) * H), H,
                                     block.columns, H, true);
                            multiply(slopes.of_queries(), {rows_k, H}, block.columns / 2, sum_q.at(i * H), H, rows, H, true);
                        }
                    }
                    task.of_query(dq[part], n, H).write(sum_q);
                }
            }
            for (int64_t part = 0; part < parts; part++) task.of_key(dk[part], H).write(sum_k.at(part * padded * H));
            task.of_key(dv, W).write(sum_v);
        }
    }
}
