#include "engine.h"

#include <algorithm>
#include <atomic>

#include "dispatch.h"
#include "pool.h"

namespace lucid {
namespace {

std::atomic<int64_t> elements_of_batch = 1 << 16;

// Elements that are brought to one contiguous buffer at a time where an operand is not so by itself: all
// buffers together stay in the first-level cache.
constexpr int64_t staged = 512;

template <class T>
Scalars<T> rounded(const HostScalars& host) {
  const bool from_average1 = host.beta1 >= 0.5;
  const bool from_average2 = host.beta2 >= 0.5;
  return {static_cast<T>(from_average1 ? host.one_minus_beta1 : host.beta1),
          static_cast<T>(from_average2 ? host.one_minus_beta2 : host.beta2),
          static_cast<T>(host.d),
          static_cast<T>(host.k),
          static_cast<T>(host.s),
          static_cast<T>(host.e),
          static_cast<T>(host.maximize ? -1 : 1),
          from_average1,
          from_average2};
}

template <class Element>
void gather(const Layout& layout, int operand, const void* from, int64_t begin, int64_t n, Element* to) {
  const auto* source = static_cast<const Element*>(from);
  for_each_run(layout, operand, begin, n, [&](int64_t position, int64_t offset, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[position + i] = source[offset + i * stride];
  });
}

template <class Element>
void scatter(const Layout& layout, int operand, void* to, int64_t begin, int64_t n, const Element* from) {
  auto* target = static_cast<Element*>(to);
  for_each_run(layout, operand, begin, n, [&](int64_t position, int64_t offset, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i) target[offset + i * stride] = from[position + i];
  });
}

int64_t size_of(Type type) {
  switch (type) {
    case Type::float64:
      return 8;
    case Type::float32:
      return 4;
    default:
      return 2;
  }
}

// n <= staged elements of the gradient from `begin` on, as T.
template <class T>
const T* staged_gradient(const Work& work, const TypedKernels<T>& kernels, int64_t begin, int64_t n, T* buffer) {
  alignas(64) char raw[staged * 8];
  const void* contiguous = raw;
  if (work.layout->contiguous[grad]) {
    contiguous = static_cast<const char*>(work.address[grad]) + begin * size_of(work.gradient);
    if (work.gradient == work.compute) return static_cast<const T*>(contiguous);
  } else if (work.gradient == Type::float64) {
    gather(*work.layout, grad, work.address[grad], begin, n, reinterpret_cast<uint64_t*>(raw));
  } else if (work.gradient == Type::float32) {
    gather(*work.layout, grad, work.address[grad], begin, n, reinterpret_cast<uint32_t*>(raw));
  } else {
    gather(*work.layout, grad, work.address[grad], begin, n, reinterpret_cast<uint16_t*>(raw));
  }
  kernels.convert[static_cast<int>(work.gradient)](contiguous, buffer, n);
  return buffer;
}

// Elements [begin, begin + n) of a row.
template <class T>
void update_part(const Work& work, const Scalars<T>& scalars, int64_t begin, int64_t n) {
  const TypedKernels<T>& typed = kernels().typed<T>();
  const UpdateFn<T> update = typed.update[work.amsgrad];
  const auto at = [&](int operand, int64_t i) { return static_cast<T*>(work.address[operand]) + i; };

  if (work.layout == nullptr) {
    update(scalars, n, at(param, begin), at(grad, begin), at(exp_avg, begin), at(exp_avg_sq, begin),
           work.amsgrad ? at(max_exp_avg_sq, begin) : nullptr);
    return;
  }

  const Layout& layout = *work.layout;
  const int operands = work.amsgrad ? max_exp_avg_sq + 1 : exp_avg_sq + 1;
  alignas(64) T buffer[max_operands][staged];
  for (int64_t done = 0; done < n; done += staged) {
    const int64_t first = begin + done;
    const int64_t count = std::min(staged, n - done);
    T* operand[max_operands] = {};
    for (int o = 0; o < operands; ++o) {
      if (o == grad) continue;
      operand[o] = layout.contiguous[o] ? at(o, first) : buffer[o];
      if (!layout.contiguous[o]) gather(layout, o, work.address[o], first, count, buffer[o]);
    }
    const T* gradient = staged_gradient(work, typed, first, count, buffer[grad]);
    update(scalars, count, operand[param], gradient, operand[exp_avg], operand[exp_avg_sq], operand[max_exp_avg_sq]);
    for (int o = 0; o < operands; ++o) {
      if (o != grad && !layout.contiguous[o]) scatter(layout, o, work.address[o], first, count, buffer[o]);
    }
  }
}

// Small rows are over before the hardware has seen a pattern in them: their first lines are asked for beforehand.
void prefetch(const Work& work) {
  constexpr int64_t line = 64, lines = 4;
  const int64_t bytes = work.elements * size_of(work.compute);
  for (int o = 0; o <= (work.amsgrad ? max_exp_avg_sq : exp_avg_sq); ++o) {
    const char* address = static_cast<const char*>(work.address[o]);
    for (int64_t at = 0; at < bytes && at < line * lines; at += line) __builtin_prefetch(address + at);
  }
}

// All rows laid end to end; batch b is elements [b * size, (b + 1) * size) of that.
struct Step {
  const std::vector<Work>& works;
  std::vector<int64_t> ends;  // of each row, in elements
  std::vector<Scalars<float>> f32;
  std::vector<Scalars<double>> f64;
  int64_t size;

  void run(int64_t batch) const {
    const int64_t begin = batch * size;
    const int64_t end = std::min(begin + size, ends.back());
    size_t row = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin());
    for (int64_t i = begin; i < end; ++row) {
      const Work& work = works[row];
      if (row + 2 < works.size()) prefetch(works[row + 2]);
      const int64_t first = i - (ends[row] - work.elements);
      const int64_t n = std::min(end, ends[row]) - i;
      const auto which = static_cast<size_t>(work.scalars);
      if (n > 0) {
        if (work.compute == Type::float64) {
          update_part(work, f64[which], first, n);
        } else {
          update_part(work, f32[which], first, n);
        }
      }
      i += n;
    }
  }
};

}  // namespace

int64_t batch_elements() { return elements_of_batch; }
void set_batch_elements(int64_t elements) { elements_of_batch = elements; }

void update(const std::vector<Work>& works, const std::vector<HostScalars>& scalars, int threads, bool serial) {
  if (works.empty()) return;
  const FloatMode mode;
  Step step{works, {}, {}, {}, batch_elements()};
  step.ends.reserve(works.size());
  int64_t total = 0;
  for (const Work& work : works) step.ends.push_back(total += work.elements);
  for (const HostScalars& host : scalars) {
    step.f32.push_back(rounded<float>(host));
    step.f64.push_back(rounded<double>(host));
  }
  const int64_t batches = (total + step.size - 1) / step.size;
  const BatchFn run = [](void* context, int64_t batch) noexcept { static_cast<const Step*>(context)->run(batch); };
  parallel_for(serial ? 1 : threads, batches, run, &step);
}

void move(int64_t n, float* a, const float* b, float* c, float* d, int threads) {
  struct Arrays {
    int64_t n, size;
    float* a;
    const float* b;
    float *c, *d;
  } arrays{n, batch_elements(), a, b, c, d};
  const BatchFn run = [](void* context, int64_t batch) noexcept {
    const Arrays& all = *static_cast<const Arrays*>(context);
    const int64_t i = batch * all.size;
    kernels().move(std::min(all.size, all.n - i), all.a + i, all.b + i, all.c + i, all.d + i);
  };
  parallel_for(threads, (n + arrays.size - 1) / arrays.size, run, &arrays);
}

}  // namespace lucid
