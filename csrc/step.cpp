// What a step does with its rows: step counts, the squares of the gradients, the update.
#include "rows.h"

#include <algorithm>
#include <cmath>

namespace lucid {

std::vector<std::pair<int, double>> Rows::steps() {
  std::vector<std::pair<int, double>> found;
  size_t first_of_group = 0;
  int group = -1;
  for (Row& row : rows_) {
    if (!row.active) continue;
    if (row.group != group) {
      group = row.group;
      first_of_group = found.size();
    }
    const double count = static_cast<double>(*row.step);
    const double step = std::floor(count) == count ? count + 1 : count;  // Python refuses a count that is not whole
    size_t which = first_of_group;
    while (which < found.size() && found[which].second != step) ++which;
    if (which == found.size()) found.emplace_back(group, step);
    row.work.scalars = static_cast<int>(which);
  }
  return found;
}

nb::list Rows::before_writing(nb::dict state) {
  remember(state.ptr());
  nb::list active;
  for (const Row& row : rows_) {
    if (row.active) active.append(nb::handle(row.param));
  }
  return active;
}

int64_t Rows::collect() {
  works_.clear();
  active_.clear();
  int64_t total = 0;
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (!rows_[i].active || rows_[i].on_device) continue;
    works_.push_back(&rows_[i].work);
    active_.push_back(static_cast<int>(i));
    total += rows_[i].work.elements;
  }
  return total;
}

std::vector<int64_t> Rows::measure(int threads, double scale, const int* kinds) {
  const int64_t elements = collect();
  std::vector<int> kind_of_work;
  int number_of_kinds = 1;
  if (kinds != nullptr) {
    number_of_kinds += *std::max_element(kinds, kinds + rows_.size());
    for (const int row : active_) kind_of_work.push_back(kinds[row]);
  }
  if (elements < worth_unlocking) return lucid::squares(works_, kind_of_work, number_of_kinds, scale, threads);
  const nb::gil_scoped_release unlocked;
  return lucid::squares(works_, kind_of_work, number_of_kinds, scale, threads);
}

std::vector<std::pair<int, RowObserved>> Rows::observed() const {
  std::vector<std::pair<int, RowObserved>> found;
  for (size_t k = 0; k < observed_.size(); ++k) found.emplace_back(active_[k], observed_[k]);
  return found;
}

void Rows::update(const std::vector<HostScalars>& scalars, int threads, bool observe, bool count, nb::list state_box) {
  if (unread_ && PyList_GetItem(state_box.ptr(), 1) != Py_False && !still_same(PyList_GetItem(state_box.ptr(), 0))) {
    throw std::runtime_error(
        "another thread changed the optimizer's state during step(), so nothing was updated; "
        "let one thread change it while no other steps");
  }
  for (Row& row : rows_) {
    if (row.active && !row.on_device && row.stream != nullptr) {
      row.work.key = draw_key(*row.stream, static_cast<int64_t>(*row.step) + 1);
    }
  }
  const int64_t total = collect();
  observed_.clear();
  std::vector<RowObserved>* const observed = observe ? &observed_ : nullptr;
  last_elements_ = total;
  last_threads_ = serial_ ? 1 : threads;
  if (total < worth_unlocking) {
    lucid::update(works_, scalars, threads, serial_, observed);
  } else {
    for (Row& row : rows_) {
      if (row.active) hold_slots(row);
    }
    const nb::gil_scoped_release unlocked;
    lucid::update(works_, scalars, threads, serial_, observed);
  }
  // update() throws only before its first write.
  for (const Row& row : rows_) {
    if (row.active && count) *row.step += 1;
  }
  written_ = true;
}

}  // namespace lucid
