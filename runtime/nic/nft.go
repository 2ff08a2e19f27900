package nic

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Tables of ours in a Pod's namespace; each is replaced and removed as a whole.
const (
	silenceTable = "h8s-silence"
	forwardTable = "h8s-forward"
)

// replaceTable makes an inet table with build's content in one transaction.
func replaceTable(ns netns.NsHandle, name string, build func(*nftables.Conn, *nftables.Table)) error {
	c, err := nftables.New(nftables.WithNetNSFd(int(ns)))
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	// Adding first makes the deletion succeed whether or not the table was there.
	t := &nftables.Table{Family: nftables.TableFamilyINet, Name: name}
	c.AddTable(t)
	c.DelTable(t)
	c.AddTable(t)
	build(c, t)
	if err := c.Flush(); err != nil {
		return fmt.Errorf("load nftables table %s: %w", name, err)
	}
	return nil
}

func removeTable(ns netns.NsHandle, name string) error {
	c, err := nftables.New(nftables.WithNetNSFd(int(ns)))
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	c.DelTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: name})
	err = c.Flush()
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove nftables table %s: %w", name, err)
	}
	return nil
}

// silence drops what the namespace's own stack sends on the links: solicitations and
// reports with the guest's addresses on them, which the guest would not know about.
// Redirected packets do not pass this hook.
func silence(ns netns.NsHandle, links []string) error {
	return replaceTable(ns, silenceTable, func(c *nftables.Conn, t *nftables.Table) {
		chain := c.AddChain(&nftables.Chain{
			Name: "output", Table: t, Type: nftables.ChainTypeFilter,
			Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFilter,
		})
		for _, l := range links {
			c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: interfaceName(l)},
				&expr.Verdict{Kind: expr.VerdictDrop},
			}})
		}
	})
}

// redirectLoopback sends locally made TCP connections to loopback addresses to the
// listeners on 127.0.0.1 and ::1; port 0 leaves that family alone.
func redirectLoopback(ns netns.NsHandle, port4, port6 uint16) error {
	return replaceTable(ns, forwardTable, func(c *nftables.Conn, t *nftables.Table) {
		chain := c.AddChain(&nftables.Chain{
			Name: "output", Table: t, Type: nftables.ChainTypeNAT,
			Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest,
		})
		for family, port := range map[byte]uint16{unix.NFPROTO_IPV4: port4, unix.NFPROTO_IPV6: port6} {
			if port == 0 {
				continue
			}
			c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: interfaceName("lo")},
				&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
				&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
				&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
				&expr.Redir{RegisterProtoMin: 1},
			}})
		}
	})
}

func interfaceName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}
