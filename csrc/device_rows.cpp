// The rows that the engine of a device updates: the tables that it reads, and the step counts that it decides.
#include "rows.h"

#include <algorithm>

namespace lucid {

std::vector<DeviceRow> Rows::device_rows() const {
  std::vector<DeviceRow> found;
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    if (!row.bound || !row.on_device) continue;
    const Work& work = row.work;
    const Numbering* numbering = work.numbering;
    const int64_t first = numbering == nullptr ? 0 : numbering->first;
    const bool one_run = numbering == nullptr || numbering->run >= work.elements;
    found.push_back({static_cast<int>(i), tensors_[row.first].device, work.compute, work.gradient, work.param_format,
                     work.moment_format, work.amsgrad, work.address[ema] != nullptr,
                     work.layout == nullptr ? 0 : static_cast<int>(std::max<size_t>(1, work.layout->sizes.size())),
                     !one_run || first + work.elements > int64_t{1} << 32, work.row % block == 0, row.wide,
                     work.elements});
  }
  return found;
}

void Rows::write_device_rows(int64_t* table, int64_t* layouts) const {
  int64_t* const first_layout = layouts;
  for (const Row& row : rows_) {
    if (!row.bound || !row.on_device) continue;
    const Work& work = row.work;
    for (int o = 0; o < max_operands; ++o) table[o] = reinterpret_cast<int64_t>(work.address[o]);
    table[grad] = 0;  // these are in write_device_step()
    table[column_elements] = work.elements;
    table[column_row] = work.row;
    const Numbering numbering = work.numbering == nullptr ? Numbering{0, int64_t{1} << 62, 0} : *work.numbering;
    table[column_first] = numbering.first;
    table[column_run] = numbering.run;
    table[column_stride] = numbering.stride;
    table[column_layout] = layouts - first_layout;
    table += device_columns;
    if (work.layout == nullptr) continue;
    const Layout& layout = *work.layout;
    const size_t dims = std::max<size_t>(1, layout.sizes.size());
    for (size_t k = 0; k < dims; ++k) *layouts++ = layout.sizes.empty() ? 1 : layout.sizes[k];
    for (const auto& strides : layout.strides) {
      for (size_t k = 0; k < dims; ++k) *layouts++ = k < strides.size() ? strides[k] : 0;
    }
  }
}

bool Rows::write_device_step(int64_t* table) const {
  const auto rows = static_cast<size_t>(
      std::count_if(rows_.begin(), rows_.end(), [](const Row& row) { return row.bound && row.on_device; }));
  bool changed = false;
  const auto put = [&](int64_t* to, int64_t value) {
    changed |= *to != value;
    *to = value;
  };
  for (const Row& row : rows_) {
    if (!row.bound || !row.on_device) continue;
    const auto gradient = reinterpret_cast<int64_t>(row.work.address[grad]);
    put(table, !row.active ? 0 : gradient == 0 ? 1 : gradient);  // an empty gradient may have address 0, and takes part
    if (row.active) put(table + rows, row.work.scalars);
    if (row.stream != nullptr) put(table + 2 * rows, static_cast<int64_t>(mixed(static_cast<uint64_t>(*row.stream))));
    ++table;
  }
  return changed;
}

DLDevice Rows::only_device() const {
  DLDevice only{0, 0};
  for (const Row& row : rows_) {
    if (!row.active) continue;
    if (!row.on_device) return {0, 0};
    const DLDevice device = tensors_[row.first].device;
    if (only.type != 0 && !(only == device)) return {0, 0};
    only = device;
  }
  return only;
}

bool Rows::assume() {
  if (assumed_.empty()) {
    for (size_t i = 0; i < rows_.size(); ++i) {
      Row& row = rows_[i];
      if (!row.active) continue;
      assumed_.emplace_back(static_cast<int>(i), nb::borrow(tensors_[row.first + 2].object));
      row.assumed = true;
    }
    return true;
  }
  size_t known = 0;
  for (const Row& row : rows_) {
    if (!row.active) continue;
    if (!row.assumed || known == assumed_.size() || !assumed_[known].second.is(tensors_[row.first + 2].object)) {
      return false;
    }
    ++known;
  }
  return known == assumed_.size();
}

void Rows::correct(int64_t correction, bool keep) {
  for (auto& [row, step] : assumed_) {
    rows_[static_cast<size_t>(row)].assumed = keep;
    DLTensor tensor;
    if (!read(step.ptr(), &tensor) || !on_cpu(tensor) || tensor.data == nullptr || tensor.dtype.bits != 32) continue;
    *static_cast<float*>(tensor.data) += static_cast<float>(correction);
  }
  if (!keep) assumed_.clear();
}

nb::list Rows::step_counts() const {
  nb::list found;
  for (const Row& row : rows_) {
    if (row.active) found.append(nb::make_tuple(row.group, nb::handle(tensors_[row.first + 2].object)));
  }
  return found;
}

}  // namespace lucid
