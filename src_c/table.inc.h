/* Every template, for FSM_TYPE, and the table of what they define: `kernels`. */

#include "exp.inc.h"
#include "load.inc.h"
#include "softmax.inc.h"
#include "backward.inc.h"
#include "weighted.inc.h"
#include "loss.inc.h"
#include "short.inc.h"
#include "rows.inc.h"
#include "columns.inc.h"
#include "score.inc.h"
#include "attention.inc.h"
#include "attention_backward.inc.h"
#include "decode.inc.h"

#define FSM_KERNELS                                                                                \
    {                                                                                              \
        .passes =                                                                                  \
            {                                                                                      \
                [FSM_SOFTMAX] = {max_pass, NULL, reference_pass, sum_pass, finish_softmax,         \
                                 map_softmax},                                                     \
                [FSM_LOG_SOFTMAX] = {max_pass, NULL, reference_pass, sum_pass, finish_log_softmax, \
                                     map_log_softmax},                                             \
                [FSM_LOGSUMEXP] = {max_pass, NULL, reference_pass, sum_pass, finish_logsumexp,     \
                                   NULL},                                                          \
                [FSM_LOGSUMEXP_WEIGHTED] = {weighted_max, weighted_max2, weighted_reference,       \
                                            weighted_sum, weighted_finish, NULL},                  \
                [FSM_SOFTMAX_BACKWARD] = {softmax_backward_max, NULL, backward_reference,          \
                                          softmax_backward_sum, backward_finish,                   \
                                          softmax_backward_map},                                   \
                [FSM_LOG_SOFTMAX_BACKWARD] = {log_backward_max, NULL, backward_reference,          \
                                              log_backward_sum, backward_finish,                   \
                                              log_backward_map},                                   \
                [FSM_CROSS_ENTROPY] = {max_pass, NULL, reference_pass, sum_pass,                   \
                                       finish_cross_entropy, NULL},                                \
                [FSM_CROSS_ENTROPY_BACKWARD] = {max_pass, NULL, reference_pass, sum_pass,          \
                                                finish_cross_entropy_backward, map_loss},          \
            },                                                                                     \
        .rows = rows_all,                                                                          \
        .columns = columns_all,                                                                    \
        .begin = begin_state,                                                                      \
        .merge = merge_state,                                                                      \
        .load = load_run,                                                                          \
        .load_special = special_run,                                                               \
        .store = store_run,                                                                        \
        .exp = exp_array,                                                                          \
        .fma = multiply_add,                                                                       \
        .attend_rows = GROUP,                                                                      \
        .attend_scratch = attend_bytes,                                                            \
        .attend = attend_unit,                                                                     \
        .gradient_scratch = gradient_bytes,                                                        \
        .gradient = gradient_unit,                                                                 \
        .decode_scratch = decode_bytes,                                                            \
        .decode_part = part_elements,                                                              \
        .decode = decode_run,                                                                      \
        .decode_end = decode_finish,                                                               \
        .merge_row = merge_one,                                                                    \
    }
