"""The text of rewritten graphs. EXPECTTEST_ACCEPT=1 updates it."""

import expecttest
import torch
import torch.nn.functional as F
from compare import LOSSLESS
from steps import drive, plain

SHORT = {"torch.ops.": "", "kvarn_records_0, kvarn_tail_0, kvarn_lengths_0, kvarn_balance_0": "*store_0",
         f"'{LOSSLESS.key}'": "spec", ", device = device(type='cpu'), pin_memory = False": "", "_default": "",
         "scaled_dot_product_attention": "sdpa"}


def code_of(step, n: int = 1) -> str:
    """The first graph's code without releases of variables, and with long names cut short."""
    code = drive(step, n=n).graphs[0].code.strip()
    for long, short in SHORT.items():
        code = code.replace(long, short)
    return "\n".join(line.split(";  ")[0].strip() for line in code.splitlines())


def copied(m, x, position):
    m.k_cache.index_copy_(2, position, x)
    m.v_cache.index_copy_(2, position, x)
    return F.scaled_dot_product_attention(x, m.k_cache, m.v_cache, is_causal=True, scale=0.5)


def sliced(m, x, position):
    m.k_cache[:, :, 4:5] = x
    m.v_cache[:, :, 4:5] = x
    return torch.softmax(x @ m.k_cache[:, :, :5].transpose(2, 3) / 8.0, -1) @ m.v_cache[:, :, :5]


def refused(m, x, position):
    m.k_cache[:, :, position] = x
    return F.scaled_dot_product_attention(x, m.k_cache, m.v_cache)


class TestGraphs(expecttest.TestCase):
    def test_index_put(self):
        self.assertExpectedInline(code_of(plain), """\
def forward(self, arg1_1, arg2_1, *store_0):
view = aten.view.default(arg1_1, [2, 1, 64])
mul = aten.mul.Tensor(arg1_1, 2)
view_1 = aten.view.default(mul, [2, 1, 64])
zeros = aten.zeros.default([1, 1, 1, 64], dtype = torch.float32)
unsqueeze = aten.unsqueeze.default(view, 0)
unsqueeze_1 = aten.unsqueeze.default(view_1, 0)
append = kvarn.append.default(unsqueeze, unsqueeze_1, arg2_1, *store_0, 64, spec)
attend = kvarn.attend.default(arg1_1, unsqueeze, unsqueeze_1, arg2_1, *store_0, zeros, 64, False, 0.125, spec)
return (attend,)""")

    def test_index_copy(self):
        self.assertExpectedInline(code_of(copied, n=2), """\
def forward(self, arg1_1, arg2_1, *store_0):
append = kvarn.append.default(arg2_1, arg2_1, arg1_1, *store_0, 64, spec)
attend = kvarn.attend.default(arg2_1, arg2_1, arg2_1, arg1_1, *store_0, None, 64, True, 0.5, spec)
return (attend,)""")

    def test_slice_and_softmax(self):
        self.assertExpectedInline(code_of(sliced), """\
def forward(self, arg1_1, *store_0):
arange_start = aten.arange.start(4, 5, dtype = torch.int64)
append = kvarn.append.default(arg1_1, arg1_1, arange_start, *store_0, 64, spec)
attend = kvarn.attend.default(arg1_1, arg1_1, arg1_1, arange_start, *store_0, None, 5, False, 0.125, spec)
return (attend,)""")

    def test_refused(self):
        self.assertExpectedInline(code_of(refused), """\
def forward(self, arg0_1, arg1_1, arg2_1, arg3_1):
view = aten.view.default(arg1_1, [2, 1, 64])
index_put = aten.index_put.default(arg0_1, [None, None, arg2_1], view)
sdpa = aten.sdpa.default(arg1_1, index_put, arg3_1, None, 0.0, False, scale = None, enable_gqa = False)
copy_ = aten.copy_.default(arg0_1, index_put)
return (sdpa,)""")
