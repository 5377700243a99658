// Breaks routers on purpose, in the middle of a training, to see what becomes of the run and what a controller does about it.
#pragma once

#include <array>
#include <string>
#include <string_view>

#include "moe_model.h"

/// Names of faults:
/// favourite   every token prefers one expert
/// sunk-third  no token wants a third of the experts
/// flat        the router forgets all it has learnt: equal scores
/// biases      the biases in force become those of a model whose first k experts take every token
inline constexpr std::array<std::string_view, 4> kFaults = {"favourite", "sunk-third", "flat", "biases"};

/// `controllers`: of each block, null where it is dense. Throws std::invalid_argument for an unknown name.
void break_routers(MoeLm& model, const std::vector<moectl::TorchController*>& controllers,
                   std::string_view fault);
/// Scales the weights of all routers: 1 leaves them as they are.
void scale_routers(MoeLm& model, double factor);
