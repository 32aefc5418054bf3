import sys; sys.path.insert(0,"/tmp/p2")
import functools
import numpy as np, torch, torch.distributed as dist
from tests.world import World
from tests.reference import dense_attention, relative_error, random_documents
from cp.packed_seq import build_packed_seq
from cp.layout import unshard_indices
from cp.native_p2p import ring_attention
from cp.native_all_gather import all_gather_attention
from cp.native_a2a import a2a_attention
@functools.cache
def groups(cp, A):
    inner=outer=None
    w=dist.get_rank()
    g=dist.new_group(list(range(cp)))
    for o in range(cp//A):
        r=[o*A+i for i in range(A)]; x=dist.new_group(r)
        if w in r: inner=x
    for i in range(A):
        r=[o*A+i for o in range(cp//A)]; x=dist.new_group(r)
        if w in r: outer=x
    return g,inner,outer
def case(rank, cp, method, A, layout, seed, hq, hkv, dtype):
    g,inner,outer=groups(cp,A)
    if rank>=cp: return None
    rng=np.random.default_rng(seed)
    unit=1 if layout=="contiguous" else 2*cp
    lengths,padded=random_documents(rng, 16*2*cp, unit*(3 if unit==1 else 1) if False else unit)
    T=int(padded.sum()); D=8
    gen=torch.Generator().manual_seed(seed)
    q,k,v,do=[torch.randn(T,h,D,generator=gen,dtype=dtype) for h in (hq,hkv,hkv,hq)]
    ps,owned=build_packed_seq(lengths,padded,cp_size=cp,cp_rank=rank,layout=layout)
    ix=torch.from_numpy(owned)
    ql,kl,vl=[x[ix].requires_grad_() for x in (q,k,v)]
    s=D**-.5
    if method=="p2p": o=ring_attention(ql,kl,vl,ps,g,scale=s)
    elif method=="ag": o=all_gather_attention(ql,kl,vl,ps,g,scale=s,heads_k_stride=1)
    else: o=a2a_attention(ql,kl,vl,ps,g,scale=s,a2a_group=inner,ring_group=outer)
    o.backward(do[ix])
    Q,K,V=[x.clone().requires_grad_() for x in (q,k,v)]
    O=dense_attention(Q,K,V,lengths,padded,scale=s); O.backward(do)
    return max(relative_error(a,b[ix]) for a,b in ((o.detach(),O.detach()),(ql.grad,Q.grad),(kl.grad,K.grad),(vl.grad,V.grad)))
if __name__=="__main__":
    with World(4) as w:
        for cp in (1,2,4):
            for m,A,layout,hq,hkv in [("p2p",1,"zigzag",4,2),("ag",1,"zigzag",4,2),("ag",1,"contiguous",4,2)]+[("a2a",a,"zigzag",hq,hkv) for a in (1,2,4) if cp%a==0 for hq,hkv in ((4,2),(8,1),(12,6),(4,4))]:
                print(cp,m,A,layout,hq,hkv,max(max(x for x in w.run(case,cp,m,A,layout,seed,hq,hkv,torch.float64) if x is not None) for seed in range(4)))
