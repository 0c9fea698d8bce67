// The optimizer's state between steps: what it contained, and whether somebody could have changed it since.
#include "rows.h"

#include <algorithm>
#include <unordered_map>

namespace lucid {

// Walks through the state in the order of the last walk and reads its addresses. Returns false if it contains other
// objects than then.
bool Rows::gather_state(PyObject* state) {
  Py_ssize_t at = 0;
  PyObject *key, *entry;
  size_t visited = 0, slot = 0;
  while (PyDict_Next(state, &at, &key, &entry)) {
    if (visited == seen_entries_.size()) return false;
    const SeenEntry& seen = seen_entries_[visited++];
    if (visited + rows_ahead < seen_entries_.size()) __builtin_prefetch(seen_entries_[visited + rows_ahead].entry);
    const size_t ahead = slot + 3 * rows_ahead;
    for (size_t k = ahead; k < ahead + 3 && k < seen_slots_.size(); ++k) {
      __builtin_prefetch(seen_slots_[k].value);
      __builtin_prefetch(reinterpret_cast<const void*>(seen_slots_[k].near));
    }
    if (key != seen.key || entry != seen.entry) return false;
    if (seen.row < 0) continue;
    if (!PyDict_Check(entry) || PyDict_Size(entry) != seen.slots) return false;
    Row& row = rows_[static_cast<size_t>(seen.row)];
    bool same = true;
    Py_ssize_t inner = 0;
    PyObject *name, *value;
    while (PyDict_Next(entry, &inner, &name, &value)) {
      SeenSlot& seen_slot = seen_slots_[slot++];
      if (name != seen_slot.key || value != seen_slot.value) return false;
      if (!row.bound || seen_slot.tensor < 0) continue;
      DLTensor tensor;
      value = local_of(value);
      if (!read(value, &tensor)) {
        same = false;
        continue;
      }
      seen_slot.near = reinterpret_cast<uintptr_t>(tensor.shape);
      same &= same_tensor(tensors_[row.first + static_cast<size_t>(seen_slot.tensor)], tensor) &&
              !(row.is_complex && is_lazy_view(value));
    }
    if (!same) {
      unbind(row);
      row.changed = row.active;
    } else if (row.active && !row.changed) {
      hold_slots(row);
    }
  }
  return visited == seen_entries_.size();
}

// Whether only the optimizer holds references to the state, its entries, their tensors and storages. Then nothing of it
// can change before somebody reads optimizer.state.
bool Rows::unreachable(PyObject* state) const {
  if (Py_REFCNT(state) != 1 || has_weak_references(state)) return false;
  const nb::object lone = nb::module_::import_("torch").attr("zeros")(1, nb::arg("device") = "cpu");
  const long fresh = storage_references(lone.ptr());
  if (fresh < 0) return false;
  const SeenSlot* slot = seen_slots_.data();
  for (const SeenEntry& seen : seen_entries_) {
    if (seen.row < 0) continue;
    const Row& row = rows_[static_cast<size_t>(seen.row)];
    if (Py_REFCNT(seen.entry) != 1) return false;
    for (const SeenSlot* end = slot + seen.slots; slot != end; ++slot) {
      if (slot->tensor < 0) continue;
      const bool assumed = row.assumed && tensors_[row.first + static_cast<size_t>(slot->tensor)].role == step_role;
      const Py_ssize_t own = 1 + row.holds_slots + assumed;
      if (Py_REFCNT(slot->value) != own || has_weak_references(slot->value)) return false;
      PyObject* const local = local_of(slot->value);
      if (local != slot->value && (Py_REFCNT(local) != 1 || has_weak_references(local))) return false;
      if (storage_references(local) != fresh) return false;
    }
  }
  return true;
}

// Another thread may have read the sealed state since gather(): checks whether it is still unchanged.
bool Rows::still_same(PyObject* state) {
  sealed_ = false;
  return gather_state(state) && std::none_of(rows_.begin(), rows_.end(), [](const Row& row) { return row.changed; });
}

void Rows::remember(PyObject* state) {
  if (!changed_) {
    if (tensors_.size() > 2 * remembered_tensors_) compact();
    return;
  }
  std::unordered_map<PyObject*, int> row_of;
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (rows_[i].bound) row_of.emplace(rows_[i].param, static_cast<int>(i));
  }
  seen_entries_.clear();
  seen_slots_.clear();
  size_t complete = 0;  // rows whose entry is the one that was bound, with all of its tensors
  Py_ssize_t at = 0;
  PyObject *key, *entry;
  while (PyDict_Next(state, &at, &key, &entry)) {
    const auto found = row_of.find(key);
    if (found == row_of.end() || !PyDict_Check(entry)) {
      seen_entries_.push_back({key, entry, 0, -1});
      continue;
    }
    seen_entries_.push_back({key, entry, PyDict_Size(entry), found->second});
    const Row& row = rows_[static_cast<size_t>(found->second)];
    uint32_t missing = (uint32_t{1} << row.tensors) - 4;  // one bit for each tensor after parameter and gradient
    Py_ssize_t inner = 0;
    PyObject *name, *value;
    while (PyDict_Next(entry, &inner, &name, &value)) {
      int tensor = -1;
      for (int k = 2; k < row.tensors; ++k) {
        if (tensors_[row.first + static_cast<size_t>(k)].object == value) tensor = k;
      }
      if (tensor >= 0) missing &= ~(uint32_t{1} << tensor);
      seen_slots_.push_back({name, value, tensor, 0});
    }
    complete += row.entry == entry && missing == 0;
  }

  compact();
  // Another thread may have changed the state since the rows were bound. Then the next step must bind them again.
  changed_ = complete != row_of.size();
}

}  // namespace lucid
