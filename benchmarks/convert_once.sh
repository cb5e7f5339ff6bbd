set -e
cd "$(git rev-parse --show-toplevel)"   # OLD: benchmarks/results of commit 8c21a58
export PYTHONPATH=src OMP_NUM_THREADS=1; PY=python
OLD=$1; R=benchmarks/rows.py
rm -rf benchmarks/results/models
$PY $R $OLD/reproduce rounds --commit 83fecb0
for x in at-15:691d44e statistics:691d44e long:cae3e14 uniform-rates:523e095 eight-rounds:f094dd6 long-65:348a3df two-rounds:c24b79f two-rounds-new-text:6613af1; do
  $PY $R $OLD/reproduce/${x%%:*} ${x%%:*} --commit ${x##*:}
done
$PY $R $OLD/reproduce/spread-windows spread-windows --commit b27ab57 --command "sparsekd reproduce III recipes/reproduce-smollm2.yaml --set corpus.root=DATA --set distill.precision=bfloat16 --rates 2e-5 --seeds 42 --set evaluate.texts.gsm8k=null --set evaluate.texts.code=null --set evaluate.texts.stories=null --set evaluate.tasks=[]"
for x in Dense+KD round-15 round-35 round-51 round-65 smollm2-135m; do
  $PY $R $OLD/reproduce/tasks/$x.json rounds --commit 4c6f467 --command "sparsekd eval MODEL --limit 100 --root DATA --json --tasks local_hellaswag,local_lambada,local_arc_easy,local_piqa,local_winogrande"
done
mkdir -p /tmp/cascade /tmp/demo; cp $OLD/reproduce/cascade.json /tmp/cascade/report.json; cp $OLD/demo.json /tmp/demo/report.json
$PY $R /tmp/cascade cascade --commit ab43274 --command "sparsekd run then.yaml --set corpus.root=DATA --set distill.precision=bfloat16 --set teacher.cascade=2 --set teacher.anchor=0.3 --set corpus.num_blocks=60 --set rounds=[0.15] --set distill.learning_rate=2e-5 --set evaluate.tasks=[]"
$PY $R /tmp/demo demo --commit cf37c23 --command "make demo"
cat > /tmp/oneoff.py <<'P'
import json, subprocess, sys
sys.path.insert(0,'benchmarks')
import _tables, rows, reproduce_summary as rs
from _record import joined
OLD=sys.argv[1]+'/'
def commit(path):
    out=subprocess.run(['git','log','--format=%h','--diff-filter=AM','-1','--',path],capture_output=True,text=True).stdout.split()
    return out[-1]
ROOT='benchmarks/results/reproduce/'
# rows of the main run: the commit that recorded the arm
for table in ('measured','trained'):
    fixed=[]
    for r in _tables.read(table,run='rounds'):
        if r['seed'] is not None: r['commit']=commit(f"{ROOT}arms/{r['arm']}/seed-{r['seed']}")
        fixed.append(r)
    _tables.add(table,fixed)
ex=[]
for r in _tables.read('experiments',run='rounds'):
    r['commit']=commit(f"{ROOT}reproduce-{r['experiment']}.json"); ex.append(r)
_tables.add('experiments',ex)
# uniform-rates: the rounds were stopped after the second one
c="sparsekd reproduce III RECIPE --rates 3e-5,1e-4,3e-4 --seeds 42"
for table in ('measured','trained'):
    fixed=[]
    for r in _tables.read(table,run='uniform-rates'):
        if r['command'] is None: r['command']=c
        fixed.append(r)
    _tables.add(table,fixed)
# the stopping rule: a stage.json of distilled
d=json.load(open(OLD+'stopping.json'))
row={"run":"stopping","arm":"round-01","seed":42}|rows._trained(d,None)|{"mlp_reduction":0.15,"learning_rate":4e-5,"losses":{},"seconds":{"distilled":d["seconds"]},"peak_memory_bytes":d["peak_memory_bytes"],"versions":None,
 "command":"sparsekd run then.yaml --set corpus.root=DATA --set distill.precision=bfloat16 --set rounds=[0.15] --set corpus.num_blocks=40 --set distill.epochs=8 --set distill.validations=16 --set distill.stop=converged --set distill.learning_rate=4e-5 --set evaluate.tasks=[] --set evaluate.max_tokens=1024 --set evaluate.agreement=false","commit":"fcde102"}
_tables.add('trained',[row])
# other texts
d=json.load(open(OLD+'other_texts.json'))
w=_tables.Windows(); out=[]
dense=d['perplexities']['dense']['0']
for arm,by in d['perplexities'].items():
    for seed,texts in by.items():
        s=None if arm=='dense' else int(seed); stage='dense' if arm=='dense' else 'distilled'
        for t,res in texts.items():
            w.put('other-texts',t,_tables.name_of(arm,s,stage),res)
            out.append({"run":"other-texts","arm":arm,"seed":s,"stage":stage,"text":t}|_tables.as_row(res,dense[t])|{"versions":joined(d['versions']),"command":d['command'].replace('DATA DATA DATA','DATA RUN CONTROLS'),"commit":d['commit']})
w.save(); _tables.add('measured',out)
# claims and causes by the intervals of today, as the pages quote them
for e in _tables.read('experiments'):
    f=rs._compared_again(_tables.found(e))
    _tables.add('comparisons', f['patterns']+f.get('attribution',[]))
P
$PY /tmp/oneoff.py $OLD
