package doctor

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// network checks what the kernel must have for tenants' Networks by making one of each in
// a network namespace that ends with the check.
func network(context.Context) Result {
	if os.Geteuid() != 0 {
		return warn("H8S_NOT_ROOT", "only root can try the kernel's network", "run h8s doctor as root")
	}
	type answer struct {
		missing []string
		err     error
	}
	done := make(chan answer, 1)
	go func() {
		// The thread is not given back: it ends with its namespace.
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() { // of the first one /proc/self tells
			inner := make(chan struct{})
			go func() {
				defer close(inner)
				runtime.LockOSThread()
				missing, err := tryNetwork()
				done <- answer{missing, err}
			}()
			<-inner
			runtime.UnlockOSThread()
			return
		}
		missing, err := tryNetwork()
		done <- answer{missing, err}
	}()
	a := <-done
	if a.err != nil {
		return fail("H8S_PERMISSION", "no network namespace can be made: "+a.err.Error(), "a real root is needed, not one of a container")
	}
	if len(a.missing) > 0 {
		return fail("H8S_KERNEL", "the kernel lacks "+strings.Join(a.missing, "; "), "use a kernel with veth, bridge, vxlan and nf_tables with its modules, as Debian's is")
	}
	return pass("veth, bridge, vxlan, nftables with maps and numgen")
}

// tryNetwork names what is missing. It changes the calling thread's network namespace.
func tryNetwork() ([]string, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, err
	}
	var missing []string
	try := func(what string, err error) {
		if err != nil {
			missing = append(missing, fmt.Sprintf("%s (%v)", what, err))
		}
	}
	try("veth links", netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "h8s-a"}, PeerName: "h8s-b"}))
	try("bridges", netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "h8s-c"}}))
	try("VXLAN", netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "h8s-d"}, VxlanId: 4097, Port: 8473, SrcAddr: net.IPv4(127, 0, 0, 1), Learning: false}))
	for _, f := range nftFeatures {
		try("nftables: "+f.name, tryRule(f.exprs))
	}
	return missing, nil
}

// nftFeatures are expressions that modules of their own provide.
var nftFeatures = []struct {
	name  string
	exprs func(c *nftables.Conn, t *nftables.Table) ([]expr.Any, error)
}{
	{"numgen", func(*nftables.Conn, *nftables.Table) ([]expr.Any, error) {
		return []expr.Any{&expr.Numgen{Register: 1, Modulus: 2, Type: unix.NFT_NG_RANDOM}}, nil
	}},
	{"connection tracking", func(*nftables.Conn, *nftables.Table) ([]expr.Any, error) {
		return []expr.Any{&expr.Ct{Register: 1, Key: expr.CtKeySTATE}}, nil
	}},
	{"fib", func(*nftables.Conn, *nftables.Table) ([]expr.Any, error) {
		return []expr.Any{&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true}}, nil
	}},
	{"maps", func(c *nftables.Conn, t *nftables.Table) ([]expr.Any, error) {
		m := &nftables.Set{Table: t, Name: "m", IsMap: true, KeyType: nftables.TypeInetService, DataType: nftables.TypeIPAddr}
		if err := c.AddSet(m, []nftables.SetElement{{Key: binaryutil.BigEndian.PutUint16(80), Val: []byte{192, 0, 2, 1}}}); err != nil {
			return nil, err
		}
		return []expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			&expr.Lookup{SourceRegister: 1, DestRegister: 1, IsDestRegSet: true, SetName: "m", SetID: m.ID},
		}, nil
	}},
	{"address translation", func(*nftables.Conn, *nftables.Table) ([]expr.Any, error) {
		return []expr.Any{&expr.Immediate{Register: 1, Data: []byte{192, 0, 2, 1}}, &expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1}}, nil
	}},
}

func tryRule(exprs func(c *nftables.Conn, t *nftables.Table) ([]expr.Any, error)) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "h8s-doctor"})
	chain := c.AddChain(&nftables.Chain{
		Name: "try", Table: t, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest,
	})
	list, err := exprs(c, t)
	if err != nil {
		return err
	}
	c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: list})
	if err := c.Flush(); err != nil {
		return err
	}
	c.DelTable(t)
	return c.Flush()
}
