#include <nanobind/nanobind.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "callbacks.h"
#include "dispatch.h"
#include "parallel.h"
#include "rows.h"
#include "team.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

// The sets in a table of scalars (lucid.engine.scalars.table), float64[1 + sets, words_of_set]; the first row is not a
// set.
std::vector<lucid::HostScalars> sets_in(nb::handle table) {
  constexpr size_t words_of_set = 32;
  Py_buffer buffer;
  if (PyObject_GetBuffer(table.ptr(), &buffer, PyBUF_SIMPLE) != 0) throw nb::python_error();
  const size_t sets = static_cast<size_t>(buffer.len) / (words_of_set * sizeof(double));
  std::vector<lucid::HostScalars> found(sets == 0 ? 0 : sets - 1);
  for (size_t k = 0; k < found.size(); ++k) {
    const auto* set = static_cast<const double*>(buffer.buf) + (k + 1) * words_of_set;
    std::memcpy(&found[k], set, sizeof found[k]);
  }
  PyBuffer_Release(&buffer);
  return found;
}

// Whether these dicts, each of this very class, still hold these values under these keys, object by object.
bool hold(nb::list dicts, nb::handle kind, nb::tuple keys, nb::list values) {
  const size_t n = dicts.size();
  if (n != values.size()) return false;
  for (size_t i = 0; i < n; ++i) {
    PyObject* const dict = PyList_GetItem(dicts.ptr(), static_cast<Py_ssize_t>(i));
    PyObject* const wanted = PyList_GetItem(values.ptr(), static_cast<Py_ssize_t>(i));
    if (dict == nullptr || wanted == nullptr) throw nb::python_error();
    if (Py_TYPE(dict) != reinterpret_cast<PyTypeObject*>(kind.ptr()) || !PyDict_Check(dict)) return false;
    for (size_t k = 0; k < keys.size(); ++k) {
      const auto at = static_cast<Py_ssize_t>(k);
      if (PyDict_GetItemWithError(dict, PyTuple_GetItem(keys.ptr(), at)) != PyTuple_GetItem(wanted, at)) {
        if (PyErr_Occurred() != nullptr) throw nb::python_error();
        return false;
      }
    }
  }
  return true;
}

// lucid.engine.cuda.row_table.DeviceRow, the same as lucid::DeviceRow field by field.
using DeviceRowTuple = std::tuple<int, int, int, int, int, int, int, bool, bool, int, bool, bool, bool, int64_t>;

// lucid.engine.observed.Observed, the same as lucid::RowObserved field by field.
using ObservedTuple = std::tuple<double, double, double, double>;

}  // namespace

// nb::sig gives the types inside Python objects, which C++ does not know. `make stubs` makes src/lucid/engine/_cpu.pyi
// from these signatures.
NB_MODULE(_cpu, m) {
  // If a traceback or a thread still holds an optimizer at exit, nanobind would warn users of a leak.
  // tests/test_caches.py looks for real leaks.
  nb::set_leak_warnings(false);
  m.doc() = "The CPU engine of lucid.optim. Private: lucid.engine.cpu is its face.";

  nb::class_<lucid::Rows>(m, "Rows")
      .def(nb::init<nb::list>(), "groups"_a, nb::sig("def __init__(self, groups: list[list[torch.Tensor]]) -> None"))
      .def("gather", &lucid::Rows::gather, "groups"_a, "state_box"_a,
           nb::sig(
               "def gather(self, groups: list[list[torch.Tensor]], state_box: list[typing.Any]) -> list[int] | None"))
      .def(
          "bind",
          [](lucid::Rows& rows, size_t index, nb::handle gradient, nb::dict entry,
             const std::vector<lucid::RowSlot>& slots, std::tuple<int, int, bool> format,
             std::tuple<int64_t, int64_t, int64_t> numbering, bool on_device) {
            const auto [first, run, stride] = numbering;
            const auto [param, moments, ema] = format;
            const lucid::RowFormat stored{static_cast<lucid::ParamFormat>(param),
                                          static_cast<lucid::MomentFormat>(moments), ema};
            return rows.bind(index, gradient, entry, slots, stored, {first, run, stride}, on_device);
          },
          "index"_a, "gradient"_a, "entry"_a, "slots"_a, "format"_a, "numbering"_a, "on_device"_a = false,
          nb::sig(
              "def bind(self, index: int, gradient: torch.Tensor, entry: dict[str, typing.Any], "
              "slots: list[tuple[int, torch.Tensor]], format: tuple[int, int, bool], numbering: tuple[int, int, int], "
              "on_device: bool = False) -> str | None"))
      .def("compare", &lucid::Rows::compare)
      .def("steps", &lucid::Rows::steps)
      .def("before_writing", &lucid::Rows::before_writing, "state"_a,
           nb::sig("def before_writing(self, state: dict[torch.Tensor, typing.Any]) -> list[torch.Tensor]"))
      .def("device_rows",
           [](const lucid::Rows& rows) {
             std::vector<DeviceRowTuple> found;
             for (const lucid::DeviceRow& row : rows.device_rows()) {
               found.emplace_back(row.row, row.device.type, row.device.index, static_cast<int>(row.compute),
                                  static_cast<int>(row.gradient), static_cast<int>(row.param_format),
                                  static_cast<int>(row.moment_format), row.amsgrad, row.ema, row.dims, row.numbered,
                                  row.whole_rows, row.wide, row.elements);
             }
             return found;
           })
      .def_prop_ro("device_structure", &lucid::Rows::device_structure)
      .def(
          "write_device_rows",
          [](const lucid::Rows& rows, uintptr_t table, uintptr_t layouts) {
            rows.write_device_rows(reinterpret_cast<int64_t*>(table), reinterpret_cast<int64_t*>(layouts));
          },
          "table"_a, "layouts"_a)
      .def(
          "write_device_step",
          [](const lucid::Rows& rows, uintptr_t table) {
            return rows.write_device_step(reinterpret_cast<int64_t*>(table));
          },
          "table"_a)
      .def("only_device",
           [](const lucid::Rows& rows) {
             const lucid::DLDevice device = rows.only_device();
             return std::make_pair(device.type, device.index);
           })
      .def("assume", &lucid::Rows::assume)
      .def("correct", &lucid::Rows::correct, "correction"_a, "keep"_a)
      .def("step_counts", &lucid::Rows::step_counts, nb::sig("def step_counts(self) -> list[tuple[int, torch.Tensor]]"))
      .def_prop_ro("serial", &lucid::Rows::serial)
      .def(
          "measure",
          [](lucid::Rows& rows, int threads, double scale, nb::handle kinds) {
            if (kinds.is_none()) return rows.measure(threads, scale, nullptr);
            Py_buffer buffer;
            if (PyObject_GetBuffer(kinds.ptr(), &buffer, PyBUF_SIMPLE) != 0) throw nb::python_error();
            const auto* all = static_cast<const int*>(buffer.buf);
            const std::vector<int> of_row(all, all + static_cast<size_t>(buffer.len) / sizeof(int));
            PyBuffer_Release(&buffer);
            return rows.measure(threads, scale, of_row.data());
          },
          "threads"_a, "scale"_a, "kinds"_a = nb::none(),
          nb::sig("def measure(self, threads: int, scale: float, kinds: array.array[int] | None = None) -> list[int]"))
      .def(
          "update",
          [](lucid::Rows& rows, nb::handle table, int threads, bool observe, bool count, nb::list state_box) {
            rows.update(sets_in(table), threads, observe, count, state_box);
          },
          "table"_a, "threads"_a, "observe"_a, "count"_a, "state_box"_a,
          nb::sig("def update(self, table: array.array[float] | bytes, threads: int, observe: bool, count: bool, "
                  "state_box: list[typing.Any]) -> None"))
      .def(
          "observed",
          [](const lucid::Rows& rows) {
            std::vector<std::pair<int, ObservedTuple>> found;
            for (const auto& [row, seen] : rows.observed()) {
              found.emplace_back(row, ObservedTuple{seen.gradient, seen.update, seen.param, seen.ratio});
            }
            return found;
          },
          nb::sig("def observed(self) -> list[tuple[int, lucid.engine.observed.Observed]]"))
      .def("release", &lucid::Rows::release)
      .def_prop_ro("written", &lucid::Rows::written)
      .def_prop_ro("sealed", &lucid::Rows::sealed);

  m.def("connect", &lucid::connect, "tensor_type"_a, nb::sig("def connect(tensor_type: type[torch.Tensor]) -> bool"));
  m.def("connect_sharded", &lucid::connect_sharded, "sharded_type"_a,
        nb::sig("def connect_sharded(sharded_type: type[torch.Tensor]) -> None"));
  m.def("simd_levels", &lucid::simd_levels);
  m.def("simd_level", &lucid::simd_level);
  m.def("set_simd_level", &lucid::set_simd_level, "name"_a);
  m.def("find_team", &lucid::find_team, "torch_library"_a, "torch_threads"_a, "inherited"_a);
  m.def("hold", &hold, "dicts"_a, "kind"_a, "keys"_a, "values"_a,
        nb::sig("def hold(dicts: list[typing.Any], kind: type, keys: tuple[str, ...], "
                "values: list[tuple[typing.Any, ...]]) -> bool"));
  m.def("find_callbacks", &lucid::find_callbacks, "torch_library"_a);
  m.def("recorded", &lucid::recorded);
  m.def("set_thread_budget", &lucid::set_thread_budget, "own"_a, "budget"_a);
  m.def("teams", &lucid::teams);
  m.def("team", &lucid::team);
  m.def("preferred_team", &lucid::preferred_team);
  m.def("set_preferred_team", &lucid::set_preferred_team, "name"_a);
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
