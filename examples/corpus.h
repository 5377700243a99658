// Real text in domains, as bytes: the same files in the same order, the same batch for the same (seed, step).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct Domain {
  std::string name;
  std::string train;     // what batches are drawn from
  std::string held_out;  // what validation reads; never trained on
};

struct Batch {
  std::vector<std::int64_t> bytes;    // [sequences, length + 1]: inputs, and targets shifted by one
  std::vector<std::int64_t> domains;  // [sequences]
  std::int64_t sequences = 0, length = 0;
};

/// King James text, C++ headers, Perl documentation and CMake modules, as they lie on this machine. Throws
/// std::runtime_error naming the Debian package of what is missing.
std::vector<Domain> system_domains();
/// Each file a domain, named after the file. Throws std::runtime_error if one cannot be read or is too short.
std::vector<Domain> file_domains(const std::vector<std::string>& paths);

/// Draws each sequence's domain by itself with the given probabilities, and a place in it. Depends on its
/// arguments alone.
Batch training_batch(const std::vector<Domain>& domains, const std::vector<double>& mixture,
                     std::uint64_t seed, std::int64_t step, std::int64_t sequences, std::int64_t length);
/// `per_domain` evenly spaced held-out sequences of each domain, those of different domains side by side.
Batch validation_set(const std::vector<Domain>& domains, std::int64_t per_domain, std::int64_t length);
