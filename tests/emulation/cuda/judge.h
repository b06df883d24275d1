// Compares the results of one case with the truth; prints and counts failures.
#pragma once

#include <cstdio>
#include <string>

#include "truth.h"

namespace driver {

class Judge {
 public:
  explicit Judge(const std::string& name) : name_(name) {}

  void expect(bool holds, const std::string& what) {
    if (holds) return;
    failures_++;
    std::fprintf(stderr, "FAILED  %s: %s\n", name_.c_str(), what.c_str());
  }

  // Each number must be within `allowed` of the truth. NaN agrees with NaN, and an infinity with itself.
  void close(const std::string& what, const Numbers& found, const Numbers& truth, double allowed, double relative = 0) {
    for (size_t q = 0; q < truth.size(); q++) {
      if (found[q] == truth[q] || (std::isnan(found[q]) && std::isnan(truth[q]))) continue;
      const double error = std::fabs(found[q] - truth[q]);
      if (error <= allowed + relative * std::fabs(truth[q])) continue;
      char text[160];
      std::snprintf(text, sizeof text, "%s[%zu] is %.9g, not %.9g: off by %.2e, allowed %.2e", what.c_str(), q,
                    found[q], truth[q], error, allowed + relative * std::fabs(truth[q]));
      return expect(false, text);
    }
  }

  // The difference must be within `allowed` of the truth in the Euclidean norm.
  void close_in_norm(const std::string& what, const Numbers& found, const Numbers& truth, double allowed) {
    Numbers difference(truth.size());
    for (size_t q = 0; q < truth.size(); q++) difference[q] = found[q] - truth[q];
    const double size = Truth::norm(truth), error = Truth::norm(difference) / (size > 0 ? size : 1);
    char text[160];
    std::snprintf(text, sizeof text, "%s is off by %.2e, allowed %.2e", what.c_str(), error, allowed);
    expect(error <= allowed, text);
  }

  int failures() const { return failures_; }

 private:
  std::string name_;
  int failures_ = 0;
};

}  // namespace driver
