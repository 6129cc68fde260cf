import sys,os,re
sys.path[:0]=[os.getcwd()+"/tests/emulator",os.getcwd()+"/tests/support"]
import emulated_mutations as em, emulator
from emulator import driver
def test_x():
    for m in em.MUTATIONS:
        if em.name(m) in os.environ["MUT"].split(","):
            emulator.LAUNCHES.clear(); m.launch(); (l,)=emulator.LAUNCHES
            blocks=l.kernel.program.blocks
            ex={i.text for b in l.entered for i in blocks[b]}
            text=em.text_of(l)
            places=[]
            for p in re.finditer(m.pattern,text):
                line=text[text.rfind("\n",0,p.start())+1:text.index("\n",p.end())]
                if line.strip().rstrip(";") in ex: places.append(p)
            p=places[round(m.far*(len(places)-1))]
            before=text[:p.start()]
            locs=re.findall(r"\.loc\s+(\d+)\s+(\d+)",before)[-6:]
            print("\nMUT",em.name(m),len(places),"locs",locs)
            files=dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"',text))
            print({k:files.get(k) for k,_ in locs})
            s=text.rfind("\n",0,p.start()-1800); print(text[s:p.end()+900])
