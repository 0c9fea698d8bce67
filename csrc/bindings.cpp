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

// lucid.engine.cuda.table.DeviceRow, field by field as lucid::DeviceRow.
using DeviceRowTuple = std::tuple<int, int, int, int, int, int, int, bool, int, bool, bool, bool, int64_t>;

// lucid.engine.observed.Observed, field by field as lucid::RowObserved.
using ObservedTuple = std::tuple<double, double, double, double>;

}  // namespace

// nb::sig: what Python objects hold, which C++ does not say. src/lucid/engine/_cpu.pyi is made of these (`make stubs`).
NB_MODULE(_cpu, m) {
  // At exit: an optimizer that a traceback or thread still holds is no news to users. tests/test_caches.py looks for
  // leaks.
  nb::set_leak_warnings(false);
  m.doc() = "The CPU engine of lucid.optim. Private: lucid.engine.cpu is its face.";

  nb::class_<lucid::Plan>(m, "Plan")
      .def(nb::init<nb::list>(), "groups"_a, nb::sig("def __init__(self, groups: list[list[torch.Tensor]]) -> None"))
      .def("gather", &lucid::Plan::gather, "groups"_a, "state_box"_a,
           nb::sig(
               "def gather(self, groups: list[list[torch.Tensor]], state_box: list[typing.Any]) -> list[int] | None"))
      .def(
          "bind",
          [](lucid::Plan& plan, size_t index, nb::handle gradient, nb::dict entry, nb::dict slots,
             std::tuple<int64_t, int64_t, int64_t> numbering, bool on_device) {
            const auto [first, run, stride] = numbering;
            return plan.bind(index, gradient, entry, slots, {first, run, stride}, on_device);
          },
          "index"_a, "gradient"_a, "entry"_a, "slots"_a, "numbering"_a, "on_device"_a = false,
          nb::sig("def bind(self, index: int, gradient: torch.Tensor, entry: dict[str, typing.Any], "
                  "slots: dict[str, torch.Tensor], numbering: tuple[int, int, int], on_device: bool = False) -> "
                  "str | None"))
      .def("compare", &lucid::Plan::compare)
      .def("remember", &lucid::Plan::remember, "state"_a,
           nb::sig("def remember(self, state: dict[torch.Tensor, typing.Any]) -> None"))
      .def("steps", &lucid::Plan::steps)
      .def("params", &lucid::Plan::params, nb::sig("def params(self) -> list[torch.Tensor]"))
      .def("device_rows",
           [](const lucid::Plan& plan) {
             std::vector<DeviceRowTuple> found;
             for (const lucid::DeviceRow& row : plan.device_rows()) {
               found.emplace_back(row.row, row.device.type, row.device.index, static_cast<int>(row.compute),
                                  static_cast<int>(row.gradient), static_cast<int>(row.param_format),
                                  static_cast<int>(row.moment_format), row.amsgrad, row.dims, row.numbered,
                                  row.whole_rows, row.wide, row.elements);
             }
             return found;
           })
      .def_prop_ro("device_structure", &lucid::Plan::device_structure)
      .def(
          "write_device_rows",
          [](const lucid::Plan& plan, uintptr_t table, uintptr_t layouts) {
            plan.write_device_rows(reinterpret_cast<int64_t*>(table), reinterpret_cast<int64_t*>(layouts));
          },
          "table"_a, "layouts"_a)
      .def(
          "write_device_step",
          [](const lucid::Plan& plan, uintptr_t table) {
            return plan.write_device_step(reinterpret_cast<int64_t*>(table));
          },
          "table"_a)
      .def("only_device",
           [](const lucid::Plan& plan) {
             const lucid::DLDevice device = plan.only_device();
             return std::make_pair(device.type, device.index);
           })
      .def("guess", &lucid::Plan::guess)
      .def("settle", &lucid::Plan::settle, "drift"_a, "keep"_a)
      .def("step_counts", &lucid::Plan::step_counts, nb::sig("def step_counts(self) -> list[tuple[int, torch.Tensor]]"))
      .def_prop_ro("serial", &lucid::Plan::serial)
      .def("measure", &lucid::Plan::measure, "threads"_a)
      .def("square_sum", &lucid::Plan::square_sum)
      .def("squares", &lucid::Plan::squares)
      .def(
          "run",
          [](lucid::Plan& plan, const std::vector<ScalarsTuple>& scalars, int threads, bool observe, bool count,
             nb::list state_box) {
            std::vector<lucid::HostScalars> host;
            for (const ScalarsTuple& one : scalars) {
              host.push_back(std::apply([](auto... field) { return lucid::HostScalars{field...}; }, one));
            }
            plan.run(host, threads, observe, count, state_box);
          },
          "scalars"_a, "threads"_a, "observe"_a, "count"_a, "state_box"_a,
          nb::sig(
              "def run(self, scalars: list[lucid.engine.scalars.Scalars], threads: int, observe: bool, count: bool, "
              "state_box: list[typing.Any]) -> None"))
      .def(
          "observed",
          [](const lucid::Plan& plan) {
            std::vector<std::pair<int, ObservedTuple>> found;
            for (const auto& [row, seen] : plan.observed()) {
              found.emplace_back(row, ObservedTuple{seen.gradient, seen.update, seen.param, seen.ratio});
            }
            return found;
          },
          nb::sig("def observed(self) -> list[tuple[int, lucid.engine.observed.Observed]]"))
      .def("release", &lucid::Plan::release)
      .def_prop_ro("ran", &lucid::Plan::ran)
      .def_prop_ro("sealed", &lucid::Plan::sealed);

  m.def("connect", &lucid::connect, "tensor_type"_a, nb::sig("def connect(tensor_type: type[torch.Tensor]) -> bool"));
  m.def("connect_sharded", &lucid::connect_sharded, "sharded_type"_a,
        nb::sig("def connect_sharded(sharded_type: type[torch.Tensor]) -> None"));
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
