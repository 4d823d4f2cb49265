package connpool

import (
	"context"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"maps"
	pathpkg "path"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// reach follows the calls of the books' methods through the package. It says which of the
// reached functions do something that they may not do. Imported packages are not read: a
// call of one is judged by its name.
type reach struct {
	info    types.Info
	bodies  map[types.Object]*ast.FuncDecl
	reached map[types.Object]bool
	faults  []string
}

// plain are the methods of imported types that only touch memory, and Stop of a timer.
var plain = strings.Fields(`Load Store Or And CompareAndSwap Get Put Len Front Next PushBack PushFront Remove
	Exactly Now Age Sub Stop Add All`)

// pure are the packages of which any function may be called, and single functions of others.
var pure = strings.Fields(`errors.New fmt.Errorf fmt.Sprintf slices math rand list heap maphash context.Background atomic clock`)

// typed is a package with the types that could be determined. Nothing of it is reached yet.
// begin are the functions with which a search of the books begins.
func typed(files []*ast.File, fset *token.FileSet) (r *reach, begin []types.Object) {
	r = &reach{
		info: types.Info{
			Uses: map[*ast.Ident]types.Object{}, Defs: map[*ast.Ident]types.Object{},
			Selections: map[*ast.SelectorExpr]*types.Selection{}, Types: map[ast.Expr]types.TypeAndValue{},
		},
		bodies: map[types.Object]*ast.FuncDecl{}, reached: map[types.Object]bool{},
	}
	conf := types.Config{Importer: closedDoors{}, Error: func(error) {}}
	conf.Check("connpool", fset, files, &r.info) // there are many errors: nothing is imported
	for _, f := range files {
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			obj := r.info.Defs[fn.Name]
			r.bodies[obj] = fn
			if fn.Recv != nil && slices.Contains([]string{"books", "rules"}, strings.Split(nameOfFunc(fn), ".")[0]) {
				begin = append(begin, obj)
			}
		}
	}
	return r, begin
}

// closedDoors imports every package as an empty one.
type closedDoors struct{}

func (closedDoors) Import(p string) (*types.Package, error) {
	pkg := types.NewPackage(p, pathpkg.Base(strings.TrimSuffix(p, "/v2")))
	pkg.MarkComplete()
	return pkg, nil
}

func (r *reach) visit(obj types.Object) {
	fn := r.bodies[obj]
	if r.reached[obj] || fn == nil {
		return
	}
	r.reached[obj] = true
	name := nameOfFunc(fn)
	fault := func(format string, args ...any) {
		r.faults = append(r.faults, name+" "+fmt.Sprintf(format, args...))
	}
	ast.Inspect(fn, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GoStmt:
			fault("starts a goroutine")
		case *ast.SelectStmt:
			fault("selects")
		case *ast.SendStmt:
			if name != "waiter.serve" { // the channel has room for the one answer
				fault("sends")
			}
		case *ast.UnaryExpr:
			if n.Op == token.ARROW {
				fault("receives")
			}
		case *ast.Ident:
			switch obj := r.info.Uses[n].(type) {
			case *types.TypeName:
				if obj.Name() == "Pool" || obj.Name() == "Conn" || obj.Name() == "Trace" {
					fault("names %s", obj.Name())
				}
			case *types.Func:
				r.visit(obj) // called, or passed on
			case *types.Var:
				if obj.IsField() && slices.Contains([]string{"env", "pool", "nc", "raw", "trace", "watcher", "socket"}, obj.Name()) {
					fault("looks at the field %s", obj.Name())
				}
			}
		case *ast.CallExpr:
			r.call(n, fault)
		}
		return true
	})
}

// call judges a call of a function outside the package, and of a function value.
func (r *reach) call(call *ast.CallExpr, fault func(string, ...any)) {
	switch f := call.Fun.(type) {
	case *ast.SelectorExpr:
		if sel := r.info.Selections[f]; sel != nil {
			if sel.Kind() == types.FieldVal {
				fault("calls what is in the field %s", f.Sel.Name)
			} else if _, ok := sel.Recv().Underlying().(*types.Interface); ok {
				fault("calls %s of an interface", f.Sel.Name)
			}
			return
		}
		if x, ok := f.X.(*ast.Ident); ok {
			if p, ok := r.info.Uses[x].(*types.PkgName); ok {
				name := p.Imported().Name()
				if !slices.Contains(pure, name) && !slices.Contains(pure, name+"."+f.Sel.Name) {
					fault("calls %s.%s", name, f.Sel.Name)
				}
				return
			}
		}
		own := false // the type of the value depends on an imported one, as list.Element's does
		for obj, fn := range r.bodies {
			if fn.Recv != nil && obj.Name() == f.Sel.Name && !slices.Contains(plain, obj.Name()) {
				own = true
				r.visit(obj)
			}
		}
		if !own && !slices.Contains(plain, f.Sel.Name) {
			fault("calls %s of something imported", f.Sel.Name)
		}
	case *ast.Ident:
		if v, ok := r.info.Uses[f].(*types.Var); ok && v.Name() != "surplus" && v.Name() != "yield" {
			fault("calls the value %s", f.Name)
		}
	}
}

// parsed is the package's source, and extra, which is added to it.
func parsed(t *testing.T, extra string) ([]*ast.File, *token.FileSet) {
	t.Helper()
	files := source(t, ".")
	if extra != "" {
		f, err := parser.ParseFile(sources, "extra.go", extra, parser.SkipObjectResolution)
		require.NoError(t, err)
		files = append(files, f)
	}
	return files, sources
}

// Under Pool.mu there is no system call, dial, close, hook, log line or foreign code. For
// the books this can be seen in the source: no method of theirs, and no function that such
// a method calls, reaches a Pool, a net.Conn, or anything that blocks.
func TestTheBooksReachNothingThatActs(t *testing.T) {
	r, begin := typed(parsed(t, ""))
	require.Greater(t, len(begin), 50)
	for _, obj := range begin {
		r.visit(obj)
	}
	require.Empty(t, r.faults)
	var names []string
	for obj := range r.reached {
		names = append(names, nameOfFunc(r.bodies[obj]))
	}
	for _, name := range []string{"books.releaseLocked", "queue.push", "conn.dropLoanState", "siteTable.add", "recency.touch", "agenda.retry", "waiter.serve", "site.warming"} {
		require.Contains(t, names, name, "the search follows calls")
	}
}

// The file names show which files can block: a file named books_* has no method of the
// pool, and all methods of the books are in such a file.
func TestTheBooksHaveFilesOfTheirOwn(t *testing.T) {
	in := map[string]bool{}
	for _, f := range source(t, ".") {
		name := sources.Position(f.Package).Filename
		ofBooks := strings.HasPrefix(name, "books")
		in[name] = true
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Recv == nil {
				continue
			}
			switch recv, _, _ := strings.Cut(nameOfFunc(fn), "."); recv {
			case "books", "rules":
				require.True(t, ofBooks, "%s is in %s", nameOfFunc(fn), name)
			case "Pool", "Conn", "Lease", "checkout", "sessionConns", "sessionConn", "idleRef":
				require.False(t, ofBooks, "%s is in %s", nameOfFunc(fn), name)
			}
		}
		if !ofBooks {
			continue
		}
		// A method of a connection, dial or waiter outside the books gets the pool by this field.
		ast.Inspect(f, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok {
				require.NotContains(t, []string{"env", "pool"}, sel.Sel.Name, "%s comes to the pool", name)
			}
			return true
		})
	}
	require.True(t, in["books.go"] && in["pool.go"])
}

func TestTheSearchForWhatActsSeesEachKind(t *testing.T) {
	faults := map[string]string{
		`c.site.env.report.log(0, "x")`: "looks at the field env",
		`var p *Pool; p.Stats()`:        "names Pool",
		`c.nc.Close()`:                  "looks at the field nc",
		`c.probe.raw.Control(nil)`:      "looks at the field raw",
		`time.AfterFunc(1, nil)`:        "calls time.AfterFunc",
		`time.Sleep(1)`:                 "calls time.Sleep",
		`slog.Info("x")`:                "calls slog.Info",
		`<-b.left`:                      "receives",
		`b.left <- struct{}{}`:          "sends",
		`select {}`:                     "selects",
		`go func() {}()`:                "starts a goroutine",
		`c.wake()`:                      "looks at the field nc",
		`a.giveUp()`:                    "calls what is in the field giveUp",
		`err.Error()`:                   "calls Error of an interface",
		`errors.Is(err, nil)`:           "calls errors.Is",
		`c.dmu.Lock()`:                  "calls Lock of something imported",
		`f := func() {}; f()`:           "calls the value f",
		`c.trace()`:                     "names Trace",
		`a.ctx.Err()`:                   "names Pool", // an Err of this package would reach it
		`(func(d *attempt) { d.takeOutcome() })(a)`:         "calls Lock of something imported",
		`x := c; y := x.site; y.env.clock.Now()`:            "looks at the field env",
		`todo := new(agenda); todo.run(nil); _ = c.uses`:    "names Pool",
		`for range b.sites.all() { c.interrupt(nil) }; _=a`: "looks at the field nc",
	}
	// One method of the books for each case, so that the package is typed once for all of them.
	extra := "package connpool\nimport (\"time\"; \"errors\"; \"log/slog\")\n"
	bodies := slices.Sorted(maps.Keys(faults))
	for i, body := range bodies {
		extra += fmt.Sprintf("func (b *books) added%d(c *conn, a *attempt, err error) { %s }\n", i, body)
	}
	all, begin := typed(parsed(t, extra))
	for i, body := range bodies {
		r := &reach{info: all.info, bodies: all.bodies, reached: map[types.Object]bool{}}
		for _, obj := range begin {
			if obj.Name() == fmt.Sprint("added", i) {
				r.visit(obj)
			}
		}
		require.NotEmpty(t, r.reached)
		found := false
		for _, f := range r.faults {
			found = found || strings.Contains(f, faults[body])
		}
		require.True(t, found, "%s: nothing %s, but %v", body, faults[body], r.faults)
	}
}

// The eight limits that may change are read in the books, under the lock. The limits in
// Config are as New got them.
func TestNobodyReadsALimitOfConfig(t *testing.T) {
	limits := strings.Fields("MaxOpen MaxPerAddr MaxIdle MaxIdlePerAddr MaxDialing MaxDialingPerAddr MaxWaiters MinIdlePerAddr")
	for _, f := range source(t, ".") {
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || strings.HasPrefix(nameOfFunc(fn), "Config.") {
				continue
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				sel, ok := n.(*ast.SelectorExpr)
				if !ok || !slices.Contains(limits, sel.Sel.Name) {
					return true
				}
				switch x := sel.X.(type) {
				case *ast.SelectorExpr:
					require.NotEqual(t, "cfg", x.Sel.Name, "%s reads cfg.%s: the limit in force is in limits", nameOfFunc(fn), sel.Sel.Name)
				case *ast.Ident:
					require.NotEqual(t, "cfg", x.Name, "%s reads cfg.%s: the limit in force is in limits", nameOfFunc(fn), sel.Sel.Name)
				}
				return true
			})
		}
	}
}

// The diagram above type phase and the table phaseMoves say the same.
func TestThePhasesMoveAsDrawn(t *testing.T) {
	phases := map[string]phase{}
	for ph := phaseNone; ph < numPhases; ph++ {
		phases[ph.String()] = ph
	}
	require.Len(t, phases, int(numPhases))
	var drawn [numPhases]uint8
	for _, f := range commented(t, "conn.go") {
		for _, m := range regexp.MustCompile(`(?m)^//\t(\w+) +-> (\w+)  `).FindAllStringSubmatch(f, -1) {
			from, known := phases[m[1]]
			require.True(t, known, m[0])
			to, known := phases[m[2]]
			require.True(t, known, m[0])
			require.Zero(t, drawn[from]&(1<<to), "%s twice", m[0])
			drawn[from] |= 1 << to
		}
	}
	require.Equal(t, phaseMoves, drawn)
}

// commented is the comments of a file.
func commented(t *testing.T, name string) (all []string) {
	f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments|parser.SkipObjectResolution)
	require.NoError(t, err)
	for _, group := range f.Comments {
		var text []string
		for _, c := range group.List {
			text = append(text, c.Text)
		}
		all = append(all, strings.Join(text, "\n"))
	}
	return all
}

func TestAMoveThatIsNotDrawnIsNoticed(t *testing.T) {
	var b books
	b.begin(rules{}, Limits{}, Limits{})
	c := &conn{site: &site{}}
	for _, to := range []phase{phaseDialing, phaseBorrowed, phaseIdle, phaseClosing, phaseNone} {
		b.moveLocked(c, to)
		require.Empty(t, b.wrongMove)
	}
	b.moveLocked(c, phaseIdle)
	require.Contains(t, b.wrongMove, "from none to idle")
	b.debug = true
	require.PanicsWithValue(t, b.wrongMove, func() {
		c.phase = phaseNone
		b.moveLocked(c, phaseIdle)
	})
}

// If the books end a pause before the agenda that began it has run, its timer never starts.
// The end of that pause affects neither a site without a pause nor a pause that began since.
func TestAPauseThatWasEndedIsNotStarted(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		p, a := n.p, at("a")
		var todo agenda
		p.mu.Lock()
		s := p.newSite(a)
		p.addSiteLocked(s, &todo)
		for range backoffAfter {
			p.noteFailureLocked(s, errNoPeer, p.clock.Exactly(), 0, false)
		}
		p.pauseLocked(s, &todo)
		first := s.backoff.pause
		require.NotNil(t, first)
		p.stopRetryLocked(s)
		p.pauseLocked(s, &todo)
		second := s.backoff.pause
		require.NotSame(t, first, second)
		p.mu.Unlock()
		todo.run(p)
		p.mu.Lock()
		require.Nil(t, first.timer)
		require.NotNil(t, second.timer)
		p.mu.Unlock()
		s.retry(first)
		p.mu.Lock()
		require.Same(t, second, s.backoff.pause, "the end of another pause ends this one")
		p.mu.Unlock()
		time.Sleep(backoffMax)
		p.mu.Lock()
		require.Nil(t, s.backoff.pause)
		p.mu.Unlock()
	})
}

var errNoPeer = fmt.Errorf("nobody is there")

// prying is a ctx whose Value uses the pool, as a caller's ctx may.
type prying struct {
	context.Context
	p *Pool
}

func (a prying) Value(key any) any {
	a.p.Stats()
	return a.Context.Value(key)
}

func TestAContextOfDialContextMayUseThePool(t *testing.T) {
	n := startSock(t, "tcp", faultnet.Options{})
	p := n.pool(t, func(*Config) {})
	network, address := n.target()
	nc, err := p.DialContext(prying{t.Context(), p}, network, address)
	require.NoError(t, err)
	require.NoError(t, nc.Close())
}

// A limit that an address may have of its own is read through limitsAt: read in Limits, it
// would be that of all addresses.
func TestLimitsOfAnAddressAreReadInOnePlace(t *testing.T) {
	limits := strings.Fields("MaxPerAddr MaxIdlePerAddr MaxDialingPerAddr MaxWaiters MinIdlePerAddr")
	found := 0
	for _, f := range source(t, ".") {
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			name := nameOfFunc(fn)
			ast.Inspect(fn, func(n ast.Node) bool {
				sel, ok := n.(*ast.SelectorExpr)
				if !ok || !slices.Contains(limits, sel.Sel.Name) {
					return true
				}
				found++
				switch x, _ := sel.X.(*ast.SelectorExpr); {
				case strings.HasPrefix(name, "Limits."), strings.HasPrefix(name, "Config."):
				case name == "Pool.SetLimits": // compares what was with what is to be
				case x == nil || x.Sel.Name != "limits": // a field of AddrLimits
				default:
					t.Errorf("%s reads limits.%s: the limit in force for a site is in limitsAt", name, sel.Sel.Name)
				}
				return true
			})
		}
	}
	require.Greater(t, found, 20, "the search finds selectors")
}
