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
    lengths,padded=random_documents(rng, 16*2*cp, unit)
    bshd = method.startswith("pt") or method.startswith("b:")
    if bshd: lengths=padded=np.array([16*cp,16*cp])
    T=int(padded.sum()); D=8
    gen=torch.Generator().manual_seed(seed)
    q,k,v,do=[torch.randn(T,h,D,generator=gen,dtype=dtype) for h in (hq,hkv,hkv,hq)]
    ps,owned=build_packed_seq(lengths,padded,cp_size=cp,cp_rank=rank,layout=layout,qkv_format="bshd" if bshd else "thd")
    ix=torch.from_numpy(owned)
    ql,kl,vl=[x[ix].requires_grad_() for x in (q,k,v)]
    s=D**-.5
    if method=="p2p": o=ring_attention(ql,kl,vl,ps,g,scale=s)
    elif method=="ag": o=all_gather_attention(ql,kl,vl,ps,g,scale=s,heads_k_stride=1)
    elif method.startswith("pt"):
        from cp.pytorch_cp import pytorch_attention
        o=pytorch_attention(ql,kl,vl,ps,g,scale=s,rotate_method=method[3:],load_balance=layout=="zigzag")
    elif method[1:2]==":":
        from cp.ring_flash import ring_flash_attention
        o=ring_flash_attention(ql,kl,vl,ps,g,scale=s,function=method[2:],heads_k_stride=1)
    else: o=a2a_attention(ql,kl,vl,ps,g,scale=s,a2a_group=inner,ring_group=outer)
    if method[1:2]==":":
        real=torch.from_numpy(np.concatenate([np.arange(p)<n for n,p in zip(lengths,padded)]))
        do=do*real[:,None,None]; o=o*real[ix][:,None,None]
    o.backward(do[ix])
    if method[1:2]==":":
        real=torch.from_numpy(np.concatenate([np.arange(p)<n for n,p in zip(lengths,padded)]))
        do=do*real[:,None,None]
    Q,K,V=[x.clone().requires_grad_() for x in (q,k,v)]
    O=dense_attention(Q,K,V,lengths,padded,scale=s); O.backward(do)
    return max(relative_error(a,b[ix]) for a,b in ((o.detach(),O.detach()),(ql.grad,Q.grad),(kl.grad,K.grad),(vl.grad,V.grad)))
if __name__=="__main__":
    with World(4) as w:
        for cp in (2,4):
            for m,layout,dt in [("pt:allgather","zigzag",torch.float64),("pt:alltoall","zigzag",torch.float64),("pt:alltoall","doc_contiguous",torch.float64),("t:llama3","contiguous",torch.float32),("t:zigzag","zigzag",torch.bfloat16),("t:zigzag","zigzag",torch.float32),("t:ring","doc_contiguous",torch.bfloat16),("b:zigzag","zigzag",torch.bfloat16),("b:ring","doc_contiguous",torch.bfloat16),("b:stripe","striped",torch.bfloat16)]:
                print(cp,m,layout,dt,max(max(x for x in w.run(case,cp,m,1,layout,seed,4,2,dt) if x is not None) for seed in range(3)))
