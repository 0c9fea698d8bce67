#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "dispatch.h"
#include "plan.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

// lucid.engine.scalars.Scalars, field by field as lucid::HostScalars.
using ScalarsTuple = std::tuple<double, double, double, double, double, double, double, double, double>;

// lucid.engine.observed.Observed, field by field as lucid::RowObserved.
using ObservedTuple = std::tuple<double, double, double, double>;

}  // namespace

NB_MODULE(_cpu, m) {
  // At exit: an optimizer that a traceback or thread still holds is no news to users. tests/test_caches.py looks for
  // leaks.
  nb::set_leak_warnings(false);
  m.doc() = "The CPU engine of lucid.optim. Private: lucid.engine.cpu is its face.";

  nb::class_<lucid::Plan>(m, "Plan")
      .def(nb::init<nb::list>(), "groups"_a)
      .def("gather", &lucid::Plan::gather, "groups"_a, "state_box"_a)
      .def(
          "bind",
          [](lucid::Plan& plan, size_t index, nb::handle gradient, nb::dict entry, nb::dict slots,
             std::tuple<int64_t, int64_t, int64_t> numbering) {
            const auto [first, run, stride] = numbering;
            return plan.bind(index, gradient, entry, slots, {first, run, stride});
          },
          "index"_a, "gradient"_a, "entry"_a, "slots"_a, "numbering"_a)
      .def("compare", &lucid::Plan::compare)
      .def("remember", &lucid::Plan::remember, "state"_a)
      .def("steps", &lucid::Plan::steps)
      .def("params", &lucid::Plan::params)
      .def("measure", &lucid::Plan::measure, "threads"_a)
      .def("square_sum", &lucid::Plan::square_sum)
      .def("squares", &lucid::Plan::squares)
      .def(
          "run",
          [](lucid::Plan& plan, const std::vector<ScalarsTuple>& scalars, int threads, bool observe,
             nb::list state_box) {
            std::vector<lucid::HostScalars> host;
            for (const ScalarsTuple& one : scalars) {
              host.push_back(std::apply([](auto... field) { return lucid::HostScalars{field...}; }, one));
            }
            plan.run(host, threads, observe, state_box);
          },
          "scalars"_a, "threads"_a, "observe"_a, "state_box"_a)
      .def("observed",
           [](const lucid::Plan& plan) {
             std::vector<std::pair<int, ObservedTuple>> found;
             for (const auto& [row, seen] : plan.observed()) {
               found.emplace_back(row, ObservedTuple{seen.gradient, seen.update, seen.param, seen.ratio});
             }
             return found;
           })
      .def("release", &lucid::Plan::release)
      .def_prop_ro("ran", &lucid::Plan::ran)
      .def_prop_ro("sealed", &lucid::Plan::sealed);

  m.def("connect", &lucid::connect, "tensor_type"_a);
  m.def("connect_sharded", &lucid::connect_sharded, "sharded_type"_a);
  m.def("simd_levels", &lucid::simd_levels);
  m.def("simd_level", &lucid::simd_level);
  m.def("set_simd_level", &lucid::set_simd_level, "name"_a);
  m.def("batch_elements", &lucid::batch_elements);
  m.def("set_batch_elements", &lucid::set_batch_elements, "elements"_a);
  m.def(
      "move",
      [](int64_t n, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d, int threads) {
        lucid::move(n, reinterpret_cast<float*>(a), reinterpret_cast<const float*>(b), reinterpret_cast<float*>(c),
                    reinterpret_cast<float*>(d), threads);
      },
      "n"_a, "a"_a, "b"_a, "c"_a, "d"_a, "threads"_a, nb::call_guard<nb::gil_scoped_release>());
}
